"""Memory of past tokens: what a layer keeps (``spec``) and who holds which page (``page_pool``)."""
