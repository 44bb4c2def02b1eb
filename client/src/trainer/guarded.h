// How C++ is called from Rust: every function returns 0, or 1 after storing what went wrong for
// consort_last_error(). No C++ exception may cross into Rust.

#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

inline thread_local std::string last_error;

template <typename Body>
int guarded(Body body) noexcept {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of unknown type";
  }
  return 1;
}
