"""The tools of the suite: namespaces, a small CNI runtime, traffic, observation. No portwright in here."""
