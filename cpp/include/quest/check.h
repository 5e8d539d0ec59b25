// Errors. A message names the operation, the argument, what was expected, what came, and what to do about it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace quest {

struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// check(ok, "gemm_int8: expected ..., got ", n, "; do ..."): throws quest::Error with the parts joined unless ok.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw Error(concat(parts...));
}

}  // namespace quest
