"""The slower suite, ``scripts/test_agents``: programs that people use, as they are installed, against a server of ours."""
