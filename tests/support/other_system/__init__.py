""" Runs the tests as on a system that is not POSIX and whose text is not UTF-8. See `__main__.py`. """
