/* What the cffi wrapper sees: every declaration file, in the order in which cffi reads them. Our own C includes those of its folder. */
#ifndef AT_NATIVE_H
#define AT_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#include "lane/decls.h"
#include "sim/decls.h"
#include "rows/decls.h"
#ifdef __linux__
#include "fabric/decls.h"
#include "ofi/decls.h"
#include "simrail/decls.h"
#include "verbs/decls.h"
#include "shm/decls.h"
#endif
#if __has_include("bench/decls.h")
#include "bench/decls.h"
#endif

#endif
