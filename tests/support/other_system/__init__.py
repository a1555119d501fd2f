""" Runs the tests as on a system without POSIX whose default encoding is not UTF-8. See `__main__.py`. """
