// SPDX-License-Identifier: Apache-2.0
#include "walk/hash.h"

#include <algorithm>

#include "spec/hash.h"

namespace optree {
namespace {

// Specs whose hash is being computed on this thread: a key may hold the spec again. Their nested
// hash is 0, so that mutually referring specs get equal hashes.
thread_local Stack<const SpecObject*, 4> hashing;

}  // namespace

Py_hash_t spec_hash(SpecObject& spec) {
    if (std::find(hashing.begin(), hashing.end(), &spec) != hashing.end()) return 0;
    struct Guard {
        explicit Guard(const SpecObject* self) { hashing.push_back(self); }
        ~Guard() { hashing.pop_back(); }
    } guard(&spec);
    const Ref alive = Ref::borrow(reinterpret_cast<PyObject*>(&spec));

    std::uint64_t hash = combine(spec.none_is_leaf ? 1 : 0, spec.tree.leaves);
    for (const Node& node : spec.tree.nodes) {
        hash = hash_node(hash, node);
        const Slot* slots = slots_of(spec.tree, node);
        hash = dispatch_slots(node.kind, [&](auto list) { return list.hash(hash, slots); });
    }
    const auto result = static_cast<Py_hash_t>(mix(hash));
    return result == -1 ? -2 : result;
}

}  // namespace optree
