"""Drawing from a finished model without its memorized pictures: methods, and a comparison of them."""
