"""HTTP: routes, what is done with every request, and how events become responses."""
