"""Domain names in policy: what a sandbox asks the DNS, what it is told, and how long that counts. Pure."""
