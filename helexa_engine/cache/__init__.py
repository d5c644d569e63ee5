"""Memory of past tokens: what a layer keeps (``spec``), who holds which page and slot (``page_pool``, ``state_pool``), and which
of them hold the beginning of a prompt that may come again (``prefix_cache``).
"""
