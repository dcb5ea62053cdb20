// SPDX-License-Identifier: Apache-2.0
// Key layouts: the keys of a mapping in both orders, shared by all mappings with these keys.
#pragma once

#include <algorithm>
#include <array>

#include "nodes/sort_keys.h"
#include "spec/tree.h"
#include "support/object_stack.h"
#include "support/sharing.h"

namespace optree {

struct State;

// An immutable Python object. A layout whose keys are not all atomic may be in a cycle, so it takes
// part in garbage collection. The others belong to a second class without that cost. With keys
// inserted as b, a and traversed in sorted order:
//
//     inserted = [b, a]   keys = [a, b]   position = [1, 0]    inserted[i] is child position[i]
//                                         order = [1, 0]       child c is inserted[order[c]]
//
// `position` and `order` are null and `keys == inserted` when the two orders agree.
struct KeyLayout {
    PyObject_VAR_HEAD  // its size is the number of words after the first key
        std::uint32_t size;
    bool atomic;  // every key is atomic (sort_keys.h): its hash never changes and it is in no cycle
    bool sorted;  // traversed in sorted order, else in insertion order
    std::atomic<std::uint64_t>
        hash;  // of the keys in traversal order, if `atomic`; 0: not computed
    std::atomic<PyObject*>
        prototype;  // owned: a dict of the keys in insertion order, to copy; or null
    std::atomic<PyObject*> entries;  // owned: a tuple of the keys in traversal order; or null
    mutable std::atomic<std::uint64_t>
        group;            // layouts of one group have equal keys in the same order; 0: none known
    std::size_t bytes;    // approximate memory use, keys included; 0: not computed
    std::uint64_t shape;  // size and `sorted` in one number, see `shape_of`
    std::uint32_t* position;
    std::uint32_t* order;
    PyObject** keys;        // borrowed from `inserted`
    PyObject* inserted[1];  // owned; more follow

    std::uint32_t child_of(std::uint32_t inserted_index) const noexcept {
        return position != nullptr ? position[inserted_index] : inserted_index;
    }
};

inline std::uint64_t shape_of(std::size_t size, bool sorted) noexcept {
    return 2 * std::uint64_t{size} + (sorted ? 1 : 0);
}

inline KeyLayout* as_layout(Slot slot) noexcept { return static_cast<KeyLayout*>(slot); }
inline PyObject* as_object(Slot slot) noexcept { return static_cast<PyObject*>(slot); }

// Layouts of recently seen mappings, found by the identity of the keys. Makes flatten 2x to 20x
// faster on trees of mappings (benchmarks/optree, nested dicts). A second table finds a layout
// whose keys are equal but other objects, which makes flatten 2x to 4x faster on trees that are
// visited once (first visit, equal keys). The cache holds only atomic keys, so it never keeps a
// user's object alive. It holds at most kMaxBytes of keys and the objects made from them. A layout
// is kept when it is seen for the second time, so keys that occur once cost little. Without the
// interpreter lock each thread has its own cache (State::layouts).
class LayoutCache {
  public:
    LayoutCache() = default;
    LayoutCache(const LayoutCache&) = delete;
    LayoutCache& operator=(const LayoutCache&) = delete;
    ~LayoutCache() { clear(); }

    static constexpr std::size_t kWays = 4;
    using Set = std::array<KeyLayout*, kWays>;

    // The set that holds layouts of this shape.
    Set& set(PyObject* first_key, std::uint64_t shape) noexcept {
        const auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(first_key));
        return sets_[((bits >> 4) + (shape << 44)) * kOdd >> (64 - kSetBits)];
    }
    // The set that holds layouts whose first key has this hash.
    Set& twin_set(Py_hash_t first_hash, std::size_t size, bool sorted) noexcept {
        return twins_[mix(static_cast<std::uint64_t>(first_hash), size, sorted) >> (64 - kSetBits)];
    }
    // The layout with exactly these key objects in insertion order, borrowed; null if it is not
    // cached.
    KeyLayout* find(PyObject* const* keys, std::size_t size) noexcept;
    // How often keys like those of `layout`, with the first one at this address, were seen before.
    // Counts up to three.
    unsigned meet(const KeyLayout* layout, PyObject* first) noexcept;
    // Adds a layout. Python code may run, as in `bytes_of_key`; `offer` may call this.
    void keep(KeyLayout* layout) noexcept;
    // Adds a layout if its keys are atomic and were seen before.
    void offer(KeyLayout* layout) noexcept;
    void clear() noexcept;
    std::size_t bytes() const noexcept { return bytes_; }

    Ref empty;                // the layout of mappings without keys
    std::uint64_t epoch = 0;  // the epoch of State at which it was last cleared

  private:
    static constexpr std::size_t kSetBits = 10;
    static constexpr std::size_t kMaxBytes = std::size_t{1} << 24;
    static constexpr std::size_t kMaxLayoutBytes = kMaxBytes / 2;
    static constexpr std::size_t kSeenBits = 10;
    static constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15ULL;
    static std::uint64_t mix(std::uint64_t bits, std::size_t size, bool sorted) noexcept {
        return (bits + size * 0x2545f4914f6cdd1dULL + (sorted ? 1 : 0)) * kOdd;
    }
    // How often this was called recently with the same bits. Counts up to three. With one entry for
    // each index, two kinds of dicts in one tree kept evicting each other when the addresses of
    // their keys collided, and neither was ever kept.
    using Meetings = std::array<std::array<std::uint32_t, kWays>, std::size_t{1} << kSeenBits>;
    static unsigned meet(Meetings& table, std::uint64_t bits) noexcept {
        auto& set = table[bits >> (64 - kSeenBits)];
        const auto mark = static_cast<std::uint32_t>(bits >> 8) & ~std::uint32_t{3};
        std::size_t way = 0;
        while (way != kWays - 1 && (set[way] & ~std::uint32_t{3}) != mark) ++way;
        const unsigned before = (set[way] & ~std::uint32_t{3}) == mark ? set[way] & 3 : 0;
        for (; way != 0; --way) set[way] = set[way - 1];
        set[0] = mark | std::min(before + 1, 3u);
        return before;
    }
    void insert(Set& set, KeyLayout* layout) noexcept;

    std::array<Set, std::size_t{1} << kSetBits> sets_{};
    std::array<Set, std::size_t{1} << kSetBits> twins_{};
    Meetings met_keys_{};
    Meetings met_twins_{};
    std::size_t bytes_ = 0;
};

// The two classes of layouts.
struct LayoutTypes {
    PyTypeObject* atomic;
    PyTypeObject* loose;  // takes part in garbage collection
};

// Makes a layout of `size` keys given in insertion order. order[child] is the index of the child's
// key; null if the traversal order is the same. Takes a reference to each key. The caller must own
// keys that are not atomic: Python code may run before the references are taken.
Ref make_layout_in_order(LayoutTypes types, PyObject* const* inserted, std::size_t size,
                         const std::uint32_t* order, bool sorted);

// Makes a layout of `size` keys given in insertion order. Sorts them, which may run Python code,
// unless `sorted` is false.
Ref make_layout(LayoutTypes types, PyObject* const* inserted, std::size_t size, bool sorted);

// A layout with both orders given: `keys` and `inserted` hold `size` equal keys. Raises KeyError if
// they do not.
Ref make_layout_with_order(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                           std::size_t size);

// The same if `keys` are strictly increasing and `inserted` holds the same objects, so no key has
// to be hashed or compared with another. Null otherwise.
Ref make_layout_of_sorted(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                          std::size_t size);

// A dict from keys to their positions, and the position of one key in it, or `size` if the key is
// missing. These run Python code.
Ref positions_of(PyObject* const* keys, std::size_t size);
std::size_t position_in(PyObject* positions, PyObject* key, std::size_t size);

// Pushes the values of a mapping in traversal order if its keys are exactly the objects of the
// layout in the same insertion order. The mapping must have as many keys as the layout. Otherwise
// pushes nothing and returns false.
bool push_known_values(const KeyLayout* layout, PyObject* mapping, ObjectStack& values);

// Makes (and caches) the layout of `mapping` in the order of the dict and pushes the values.
Ref scan_unknown(LayoutCache& cache, LayoutTypes types, PyObject* mapping, bool sorted,
                 ObjectStack& values);

// A new dict with the keys in insertion order and the children as values. Takes over the children;
// null on error.
PyObject* new_dict_of(State& state, KeyLayout* layout, PyObject** children);

// The same for an OrderedDict.
PyObject* new_ordered_dict_of(State& state, KeyLayout* layout, PyObject** children);

// Stores the children under the keys in insertion order. Takes over the children. Drops `mapping`
// and returns null on error.
template <int (*SetItem)(PyObject*, PyObject*, PyObject*)>
PyObject* fill_mapping(PyObject* mapping, const KeyLayout* layout, PyObject** children) {
    if (OPTREE_UNLIKELY(mapping == nullptr)) {
        for (std::uint32_t i = 0; i < layout->size; ++i) drop(children[i]);
        return nullptr;
    }
    int status = 0;
    for (std::uint32_t i = 0; i < layout->size && status == 0; ++i) {
        status = calling_python(
            [&] { return SetItem(mapping, layout->inserted[i], children[layout->child_of(i)]); });
    }
    for (std::uint32_t i = 0; i < layout->size; ++i) drop(children[i]);
    if (OPTREE_UNLIKELY(status != 0)) {
        drop(mapping);
        return nullptr;
    }
    return mapping;
}

// The keys as a new list in traversal order.
Ref layout_keys(const KeyLayout* layout);

// The keys as a tuple in traversal order. It is kept for the next call if the keys are atomic.
Ref layout_entries(KeyLayout* layout);

// Whether an object is a key layout.
bool is_layout(PyObject* object) noexcept;

// A new dict with the keys in insertion order and None for each value.
Ref dict_of_keys(KeyLayout* layout);

// Whether two layouts have equal keys in the same traversal order. May run Python code.
bool same_keys(const KeyLayout* a, const KeyLayout* b);

// Creates one of the two heap types of layouts.
Ref make_layout_type(bool loose);

}  // namespace optree
