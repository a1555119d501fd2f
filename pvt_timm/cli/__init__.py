""" The command line `pvt-timm`, one file a command. """
