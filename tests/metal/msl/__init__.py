"""Translation of Metal Shading Language to C++ and the checks on its source."""
