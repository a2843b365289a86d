"""The daemon's socket: framing, server, contract of the methods, and the Python clients.

Nothing here knows the daemon: the server is given a dispatch function, and ``methods`` is the
contract that the daemon implements and the clients call.
"""
