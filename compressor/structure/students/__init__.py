"""Students of a network: built, trained and judged, one after the other or in processes beside."""
