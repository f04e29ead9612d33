"""The API's side of a request: which version answers it, when it is refused, and how it goes on after a loss."""
