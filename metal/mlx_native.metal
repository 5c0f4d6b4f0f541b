#include "mlx_native.h"
