"""What passes look for: sites that several of them share."""
