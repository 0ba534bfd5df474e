"""What every package uses: checks of arguments, random streams, whole files, calibration."""
