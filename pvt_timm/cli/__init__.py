""" The command line `pvt-timm`: its options are in `main`, what the commands do in the other files. """
