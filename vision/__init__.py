"""Vision networks and the features made with them."""
