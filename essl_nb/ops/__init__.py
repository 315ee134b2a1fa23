"""Pure functions over frames that several mixers share: time tiles, convolutions and windows over time, the selective scan."""
