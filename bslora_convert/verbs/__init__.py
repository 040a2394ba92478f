"""What each verb does, a page a verb; the command line parses and prints around them."""
