"""A model replica: the engines of the versions that it is to serve, and how it answers requests with them."""
