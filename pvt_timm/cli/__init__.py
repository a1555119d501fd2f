""" The command line `pvt-timm`. `main` builds its parser, the other files hold the commands. """
