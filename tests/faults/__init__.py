"""What must hold while servers, links and processes fail: on real servers, under load."""
