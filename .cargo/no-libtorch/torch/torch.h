// Stands in for libtorch's header of this name where libtorch is missing (see .cargo/config.toml).
#error "libtorch is not set up in this checkout: run deploy/libtorch (or set LIBTORCH to a libtorch 2.13.0), then build again"
// Ends the compilation here, so that nothing follows that would hide the message above.
#include "libtorch is not set up: run deploy/libtorch"
