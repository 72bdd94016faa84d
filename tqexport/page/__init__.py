"""A network as a web page: a folder that any web server gives out and that runs without a network."""
