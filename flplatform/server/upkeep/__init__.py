"""What an operator does with a server's state from outside: check, show, replay, back up, restore.

Everything here but `restore` only reads, and works beside a running server.
"""
