"""A deterministic simulation of an authority, and the replica that follows it: no thread, socket or real clock."""
