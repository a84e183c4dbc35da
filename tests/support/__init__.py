"""What several tests need: waiting, ports."""
