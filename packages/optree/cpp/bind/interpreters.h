// SPDX-License-Identifier: Apache-2.0
// Which interpreters of the process use the module. Stores plain numbers and no Python objects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>

namespace optree {

std::int64_t current_interpreter();
std::int64_t main_interpreter();

void interpreter_enters(std::int64_t id);
void interpreter_leaves(std::int64_t id);
std::size_t interpreters_seen();
std::set<std::int64_t> alive_interpreters();

}  // namespace optree
