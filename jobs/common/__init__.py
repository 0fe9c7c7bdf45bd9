"""What several jobs share: writing their data, and what is measured of them."""
