"""The ``portwright`` command: translates between a shell and the client, and decides nothing."""
