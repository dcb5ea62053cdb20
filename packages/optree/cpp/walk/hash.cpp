// SPDX-License-Identifier: Apache-2.0
#include "walk/hash.h"

#include <algorithm>

#include "spec/hash.h"

namespace optree {
namespace {

std::uint64_t hash_of(PyObject* object) {
    const Py_hash_t hash = PyObject_Hash(object);
    if (hash == -1 && PyErr_Occurred()) throw PythonError{};
    return static_cast<std::uint64_t>(hash);
}

// Keys that are not atomic may change their hash, so theirs is computed each time.
std::uint64_t hash_keys(KeyLayout* layout) {
    if (const std::uint64_t known = layout->hash.load(std::memory_order_relaxed)) return known;
    std::uint64_t hash = layout->size;
    for (std::uint32_t i = 0; i < layout->size; ++i) hash = combine(hash, hash_of(layout->keys[i]));
    if (layout->atomic) layout->hash.store(hash, std::memory_order_relaxed);
    return hash;
}

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
        switch (node.kind) {
            case Kind::dict:
            case Kind::frozendict:
            case Kind::ordereddict: hash = combine(hash, hash_keys(as_layout(slots[0]))); break;
            case Kind::defaultdict:
                hash = combine(hash, hash_of(as_object(slots[1])));
                hash = combine(hash, hash_keys(as_layout(slots[0])));
                break;
            case Kind::deque:
                hash = combine(
                    hash, slots[0] != nullptr ? hash_of(as_object(slots[0])) : ~std::uint64_t{0});
                break;
            case Kind::namedtuple:
            case Kind::structseq: hash = combine(hash, hash_of(as_object(slots[0]))); break;
            case Kind::custom:
                hash = combine(hash, hash_of(as_registration(slots[0])->type));
                break;
            default: break;
        }
    }
    const auto result = static_cast<Py_hash_t>(mix(hash));
    return result == -1 ? -2 : result;
}

}  // namespace optree
