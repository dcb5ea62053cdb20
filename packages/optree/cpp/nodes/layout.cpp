// SPDX-License-Identifier: Apache-2.0
#include "nodes/layout.h"

#include <algorithm>
#include <cstring>

#include "cpython/odict_list.h"
#include "nodes/gather.h"
#include "nodes/look_ahead.h"
#include "nodes/sort_keys.h"
#include "support/errors.h"

namespace optree {
namespace {

void layout_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    if (PyType_IS_GC(type)) PyObject_GC_UnTrack(self);
    auto* layout = reinterpret_cast<KeyLayout*>(self);
    for (std::uint32_t i = 0; i < layout->size; ++i) Py_XDECREF(layout->inserted[i]);
    Py_XDECREF(layout->prototype.load());
    Py_XDECREF(layout->entries.load());
    type->tp_free(self);
    Py_DECREF(type);
}

int layout_traverse(PyObject* self, visitproc visit, void* arg) {
    const auto* layout = reinterpret_cast<KeyLayout*>(self);
    OPTREE_VISIT_TYPE(self);
    for (std::uint32_t i = 0; i < layout->size; ++i) Py_VISIT(layout->inserted[i]);
    return 0;
}

PyType_Slot layout_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(layout_dealloc)},
    {0, nullptr},
};

// Without tp_clear: a layout never changes, so that every cycle through it has another object to cut.
PyType_Slot loose_layout_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(layout_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(layout_traverse)},
    {0, nullptr},
};

PyType_Spec layout_spec = {
    "optree._C.KeyLayout",
    static_cast<int>(offsetof(KeyLayout, inserted)),
    static_cast<int>(sizeof(PyObject*)),
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | compat::kNoInstantiation),
    layout_slots,
};

PyType_Spec loose_layout_spec = {
    "optree._C.LooseKeyLayout",
    static_cast<int>(offsetof(KeyLayout, inserted)),
    static_cast<int>(sizeof(PyObject*)),
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | compat::kNoInstantiation),
    loose_layout_slots,
};

bool all_atomic(PyObject* const* keys, std::size_t size) noexcept {
    for (std::size_t i = 0; i < size; ++i) {
        if (!is_atomic(keys[i])) return false;
    }
    return true;
}

// The arrays follow the object: inserted[size], then keys[size] and position[size] when the orders
// differ. Takes a reference to each key. The caller owns keys that are not atomic: Python code may run
// before the references are taken.
Ref fill_layout(LayoutTypes types, PyObject* const* inserted, std::size_t size,
                const std::uint32_t* order, bool sorted) {
    const std::uint32_t count = checked_count(size);
    const bool atomic = all_atomic(inserted, size);
    const std::size_t words =
        order != nullptr
            ? 2 * size + (size * sizeof(std::uint32_t) + sizeof(PyObject*) - 1) / sizeof(PyObject*)
            : size;
    const auto extra = static_cast<Py_ssize_t>(words);
    auto* layout = atomic ? PyObject_NewVar(KeyLayout, types.atomic, extra)
                          : PyObject_GC_NewVar(KeyLayout, types.loose, extra);
    if (layout == nullptr) throw PythonError{};
    layout->size = count;
    layout->atomic = atomic;
    layout->sorted = sorted;
    layout->bytes = 0;
    new (&layout->hash) std::atomic<std::uint64_t>(0);
    new (&layout->group) std::atomic<std::uint64_t>(0);
    new (&layout->prototype) std::atomic<PyObject*>(nullptr);
    new (&layout->entries) std::atomic<PyObject*>(nullptr);
    PyObject** own = layout->inserted;
    layout->keys = order != nullptr ? own + size : own;
    layout->position =
        order != nullptr ? reinterpret_cast<std::uint32_t*>(layout->keys + size) : nullptr;
    for (std::uint32_t i = 0; i < count; ++i) own[i] = compat::new_ref(inserted[i]);
    if (order != nullptr) {
        for (std::uint32_t child = 0; child < count; ++child) {
            layout->keys[child] = inserted[order[child]];
            layout->position[order[child]] = child;
        }
    }
    if (!atomic) PyObject_GC_Track(reinterpret_cast<PyObject*>(layout));
    return Ref::steal(reinterpret_cast<PyObject*>(layout));
}

}  // namespace

KeyLayout* LayoutCache::find(PyObject* const* keys, std::size_t size) noexcept {
    if (size == 0) return reinterpret_cast<KeyLayout*>(empty.get());
    for (KeyLayout* layout : set(keys[0], size, false)) {
        if (layout == nullptr) return nullptr;
        if (layout->size == size && !layout->sorted &&
            std::equal(keys, keys + size, layout->inserted)) {
            return layout;
        }
    }
    return nullptr;
}

unsigned LayoutCache::meet(const KeyLayout* layout, PyObject* first) noexcept {
    const auto hash = static_cast<std::uint64_t>(PyObject_Hash(first));
    const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(first));
    return meet(met_keys_, mix(address ^ hash, layout->size, layout->sorted));
}

void LayoutCache::keep(KeyLayout* layout) noexcept {
    insert(set(layout->inserted[0], layout->size, layout->sorted), layout);
}

namespace {

// With the tuple of entries and the prototype (at most two thirds full) that may be made of it.
std::size_t bytes_of(KeyLayout* layout) noexcept {
    if (layout->bytes == 0) {
        std::size_t bytes = sizeof(KeyLayout) + sizeof(PyTupleObject) + sizeof(PyDictObject) + 128;
        for (std::uint32_t i = 0; i < layout->size; ++i) {
            const std::size_t key = bytes_of_key(layout->inserted[i]);
            bytes += key < SIZE_MAX / 2 - bytes ? key : SIZE_MAX / 2 - bytes;
        }
        layout->bytes = bytes + std::size_t{layout->size} * 10 * sizeof(PyObject*);
    }
    return layout->bytes;
}

}  // namespace

void LayoutCache::offer(KeyLayout* layout) noexcept {
    if (!layout->atomic || layout->size == 0) return;
    PyObject* first = layout->inserted[0];
    if (meet(layout, first) != 0) keep(layout);
    const Py_hash_t hash = PyObject_Hash(first);
    if (meet(met_twins_, mix(static_cast<std::uint64_t>(hash), layout->size, layout->sorted)) !=
        0) {
        insert(twin_set(hash, layout->size, layout->sorted), layout);
    }
}

void LayoutCache::insert(Set& set, KeyLayout* layout) noexcept {
    const std::size_t bytes = bytes_of(layout);
    if (bytes > kMaxLayoutBytes) return;
    if (bytes_ + bytes > kMaxBytes) clear();
    KeyLayout* oldest = set[kWays - 1];
    for (std::size_t way = kWays - 1; way > 0; --way) set[way] = set[way - 1];
    Py_INCREF(reinterpret_cast<PyObject*>(layout));
    set[0] = layout;
    bytes_ += bytes;
    if (oldest != nullptr) {
        bytes_ -= bytes_of(oldest);
        Py_DECREF(reinterpret_cast<PyObject*>(oldest));
    }
}

void LayoutCache::clear() noexcept {
    for (auto* table : {&sets_, &twins_}) {
        for (Set& set : *table) {
            for (KeyLayout*& layout : set) {
                PyObject* old = reinterpret_cast<PyObject*>(layout);
                layout = nullptr;
                Py_XDECREF(old);
            }
        }
    }
    bytes_ = 0;
    met_keys_.fill(0);
    met_twins_.fill(0);
}

namespace {

// A layout of equal keys that are other objects.
Ref copy_layout(LayoutTypes types, const KeyLayout* layout, PyObject* const* inserted) {
    KeyOrder order;
    if (layout->position != nullptr) {
        order.reserve(layout->size);
        order.set_size(layout->size);
        for (std::uint32_t i = 0; i < layout->size; ++i) order[layout->position[i]] = i;
    }
    return fill_layout(types, inserted, layout->size,
                       layout->position != nullptr ? order.data() : nullptr, layout->sorted);
}

}  // namespace

Ref make_layout(LayoutTypes types, PyObject* const* inserted, std::size_t size, bool sorted) {
    KeyOrder order;
    const bool permuted = sorted && size > 1 && sort_keys(inserted, size, order);
    return fill_layout(types, inserted, size, permuted ? order.data() : nullptr, sorted);
}

Ref make_layout_with_order(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                           std::size_t size) {
    Ref index = checked(PyDict_New());
    for (std::size_t i = 0; i < size; ++i) {
        Ref number = checked(PyLong_FromSize_t(i));
        check_status(PyDict_SetItem(index.get(), inserted[i], number.get()));
    }
    std::vector<std::uint32_t> order(size);
    std::vector<bool> taken(size, false);  // keys whose __eq__ lies must not make holes
    bool permuted = false;
    for (std::size_t child = 0; child < size; ++child) {
        const Ref number = Ref::steal(compat::dict_item(index.get(), keys[child]));
        if (!number && PyErr_Occurred()) throw PythonError{};
        // Whatever stands there: the dict is reachable for code that asks the collector for all objects.
        const std::size_t at =
            number && PyLong_CheckExact(number.get()) ? PyLong_AsSize_t(number.get()) : size;
        if (at >= size || taken[at]) {
            PyErr_Clear();
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        order[child] = static_cast<std::uint32_t>(at);
        taken[at] = true;
        permuted = permuted || at != child;
    }
    return fill_layout(types, inserted, size, permuted ? order.data() : nullptr, true);
}

namespace {

// The positions of distinct objects in an array.
class Positions {
  public:
    static constexpr std::uint32_t kNone = ~std::uint32_t{0};

    Positions(PyObject* const* objects, std::size_t size) : objects_(objects) {
        while (std::size_t{1} << bits_ < 2 * size) ++bits_;
        const std::size_t places = std::size_t{1} << bits_;
        places_.reserve(places);
        places_.set_size(places);
        std::fill(places_.begin(), places_.end(), kNone);
        for (std::uint32_t i = 0; i < size; ++i) place_of(objects[i]) = i;
    }
    // kNone if the object is not there.
    std::uint32_t of(PyObject* object) noexcept { return place_of(object); }

  private:
    std::uint32_t& place_of(PyObject* object) noexcept {
        const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(object));
        std::size_t at = (address >> 4) * 0x9e3779b97f4a7c15ULL >> (64 - bits_);
        const std::size_t mask = places_.size() - 1;
        while (places_[at] != kNone && objects_[places_[at]] != object) at = (at + 1) & mask;
        return places_[at];
    }

    PyObject* const* objects_;
    unsigned bits_ = 1;
    Scratch<std::uint32_t, 256> places_;
};

}  // namespace

Ref make_layout_of_sorted(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                          std::size_t size) {
    if (!strictly_increasing(keys, size)) return nullptr;
    if (std::equal(keys, keys + size, inserted)) {
        return fill_layout(types, inserted, size, nullptr, true);
    }
    Positions children(keys, size);
    KeyOrder order;
    order.reserve(size);
    order.set_size(size);
    std::fill(order.begin(), order.end(), Positions::kNone);
    for (std::uint32_t i = 0; i < size; ++i) {
        const std::uint32_t child = children.of(inserted[i]);
        if (child == Positions::kNone || order[child] != Positions::kNone) return nullptr;
        order[child] = i;
    }
    return fill_layout(types, inserted, size, order.data(), true);
}

bool push_known_values(const KeyLayout* layout, PyObject* mapping, ObjectStack& values) {
    const CriticalSection reading(mapping);
    const std::size_t size = layout->size;
    if (PyDict_GET_SIZE(mapping) != static_cast<Py_ssize_t>(size)) return false;
    if (size == 0) return true;
    values.reserve(size);
    PyObject** out = values.data() + values.size();
    if (!keys_match(layout, entries_of(mapping), mapping, out, identical)) return false;
    for (std::size_t i = 0; i < size; ++i) Py_INCREF(out[i]);
    values.adopt(size);
    return true;
}

namespace {

// Keys that Python's sort compares, and the values under them in the same order.
Ref scan_by_python(LayoutCache& cache, LayoutTypes types, ObjectStack& keys, ObjectStack& unordered,
                   ObjectStack& values) {
    Ref owner = make_layout(types, keys.data(), keys.size(), true);
    cache.offer(as_layout(owner.get()));
    const auto* layout = reinterpret_cast<KeyLayout*>(owner.get());
    const std::size_t base = values.extend(keys.size());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        values[base + layout->child_of(i)] = unordered[i];
    }
    unordered.forget_from(0);
    return owner;
}

// A kept layout of equal keys that are other objects, borrowed, with the values (borrowed) at `out`;
// null if there is none. Keys, which are read, and values, which are read next, are asked for in
// batches: half the time of a first visit with equal keys (benchmarks/optree).
KeyLayout* gather_by_twin(LayoutCache& cache, const DictEntries& entries, PyObject* mapping,
                          PyObject* first, bool sorted, PyObject** out) {
    constexpr std::uint32_t kBatch = 32;
    const std::uint32_t size = checked_count(static_cast<std::size_t>(PyDict_GET_SIZE(mapping)));
    entries.prefetch(0, std::min(kBatch, size));
    if (!is_atomic(first)) return nullptr;
    const auto same = [&](std::uint32_t i, PyObject* key, PyObject* expected) {
        if (i % kBatch == 0) entries.prefetch(i, std::min(kBatch, size - i));
        return same_atomic(key, expected);
    };
    for (KeyLayout* twin : cache.twin_set(PyObject_Hash(first), size, sorted)) {
        if (twin == nullptr) return nullptr;
        if (twin->size == size && twin->sorted == sorted &&
            keys_match(twin, entries, mapping, out, same)) {
            return twin;
        }
    }
    return nullptr;
}

}  // namespace

Ref scan_unknown(LayoutCache& cache, LayoutTypes types, PyObject* mapping, bool sorted,
                 ObjectStack& values) {
    ObjectStack own_keys;
    ObjectStack own_values;
    {
        const CriticalSection reading(mapping);  // while keys and values are borrowed
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
        if (size == 0) return Ref::borrow(cache.empty.get());
        const DictEntries entries = entries_of(mapping);
        PyObject* first = first_key(entries, mapping);
        values.reserve(size);
        PyObject** out = values.data() + values.size();
        KeyLayout* twin = gather_by_twin(cache, entries, mapping, first, sorted, out);
        // Trees that come again and again are to find their own keys; the others share the twin's. Keys
        // that died may have left their address to equal ones, so that twice says nothing: making
        // layouts for them cost a quarter of a first visit with equal keys (benchmarks/optree).
        Ref owner;
        if (twin != nullptr && cache.meet(twin, first) < 3) {
            owner = Ref::borrow(reinterpret_cast<PyObject*>(twin));
        } else {
            Scratch<PyObject*, 64> keys;
            Scratch<PyObject*, 64> unordered;
            keys.reserve(size);
            unordered.reserve(size);
            visit_items(entries, mapping, checked_count(size),
                        [&](std::uint32_t, PyObject* key, PyObject* value) {
                            keys.push_unchecked(key);
                            unordered.push_unchecked(value);
                            return true;
                        });
            KeyOrder order;
            Plain plain = Plain::in_order;
            if (twin != nullptr) {
                owner = copy_layout(types, twin, keys.data());
                cache.keep(as_layout(owner.get()));
            } else {
                if (sorted) plain = sort_plain_keys(keys.data(), size, order);
                if (plain != Plain::not_plain) {
                    owner = fill_layout(types, keys.data(), size,
                                        plain == Plain::permuted ? order.data() : nullptr, sorted);
                    const auto* layout = reinterpret_cast<KeyLayout*>(owner.get());
                    for (std::uint32_t i = 0; i < layout->size; ++i) {
                        out[layout->child_of(i)] = unordered[i];
                    }
                    cache.offer(as_layout(owner.get()));
                }
            }
            if (plain == Plain::not_plain) {
                for (std::size_t i = 0; i < size; ++i) {
                    own_keys.push(keys[i]);
                    own_values.push(unordered[i]);
                }
            }
        }
        if (owner) {
            take_references(out, size);
            look_at_keys(out, size);
            values.adopt(size);
            return owner;
        }
    }
    return scan_by_python(cache, types, own_keys, own_values, values);
}

namespace {

// Keeps what was made of a layout (taking over the reference) for the next time. Borrowed.
PyObject* keep(std::atomic<PyObject*>& place, PyObject* made) noexcept {
    PyObject* known = nullptr;
    if (OPTREE_LIKELY(place.compare_exchange_strong(known, made))) return made;
    Py_DECREF(made);  // a collection's finalizer, or another thread, was faster
    return known;
}

// A dict of the keys, all None, made once a layout.
PyObject* prototype_of(KeyLayout* layout) noexcept {
    PyObject* known = layout->prototype.load(std::memory_order_acquire);
    if (OPTREE_LIKELY(known != nullptr)) return known;
    PyObject* prototype = PyDict_New();
    if (prototype == nullptr) return nullptr;
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        if (PyDict_SetItem(prototype, layout->inserted[i], Py_None) < 0) {
            Py_DECREF(prototype);
            return nullptr;
        }
    }
    // Keys that are tuples make the collector track it. It is in no cycle, and nobody is to find it.
    PyObject_GC_UnTrack(prototype);
    return keep(layout->prototype, prototype);
}

}  // namespace

PyObject* new_dict_of(KeyLayout* layout, PyObject** children) {
    if (!trials.dict_table.held() || !layout->atomic || layout->size == 0) {
        return fill_mapping<PyDict_SetItem>(compat::new_dict(layout->size), layout, children);
    }
    PyObject* prototype = prototype_of(layout);
    const std::uint32_t* position = layout->position;
    const auto child_of = [&](std::uint32_t i) {
        return children[position != nullptr ? position[i] : i];
    };
    PyObject* dict = prototype != nullptr ? dict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_LIKELY(dict != nullptr)) return dict;
    return fill_mapping<PyDict_SetItem>(nullptr, layout, children);
}

PyObject* new_ordered_dict_of(KeyLayout* layout, PyObject** children) {
    if (!odict_list_is_writable() || !layout->atomic || layout->size == 0) {
        return fill_mapping<PyODict_SetItem>(PyODict_New(), layout, children);
    }
    PyObject* prototype = prototype_of(layout);
    if (OPTREE_UNLIKELY(prototype != nullptr && PyDict_GET_SIZE(prototype) != layout->size)) {
        // One key twice: of an OrderedDict that was changed behind its back.
        return fill_mapping<PyODict_SetItem>(PyODict_New(), layout, children);
    }
    const auto child_of = [&](std::uint32_t i) { return children[layout->child_of(i)]; };
    PyObject* made = prototype != nullptr ? odict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_LIKELY(made != nullptr)) return made;
    return fill_mapping<PyODict_SetItem>(nullptr, layout, children);
}

Ref dict_of_keys(KeyLayout* layout) {
    if (layout->atomic) {
        PyObject* prototype = prototype_of(layout);
        if (OPTREE_UNLIKELY(prototype == nullptr)) throw PythonError{};
        return checked(PyDict_Copy(prototype));
    }
    Ref dict = checked(PyDict_New());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        check_status(PyDict_SetItem(dict.get(), layout->inserted[i], Py_None));
    }
    return dict;
}

Ref layout_keys(const KeyLayout* layout) {
    Ref list = checked(PyList_New(layout->size));
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        PyList_SET_ITEM(list.get(), i, compat::new_ref(layout->keys[i]));
    }
    return list;
}

Ref layout_entries(KeyLayout* layout) {
    PyObject* entries = layout->entries.load(std::memory_order_acquire);
    if (OPTREE_UNLIKELY(entries == nullptr)) {
        Ref made = tuple_of(layout->keys, layout->size);
        if (!layout->atomic) return made;  // a layout never changes for the collector
        entries = keep(layout->entries, made.release());
    }
    return Ref::borrow(entries);
}

bool is_layout(PyObject* object) noexcept { return Py_TYPE(object)->tp_dealloc == layout_dealloc; }

namespace {

// Remembers that two layouts have equal keys, which stay so. Whoever is ever given a group's number
// equals all that were given it, whatever the order in which threads get here.
void join_group(const KeyLayout* a, const KeyLayout* b, std::uint64_t group) noexcept {
    static std::atomic<std::uint64_t> last{0};
    if (group == 0) {
        group = a->group.load(std::memory_order_relaxed);
        if (group == 0) group = ++last;
        b->group.store(group, std::memory_order_relaxed);
    }
    a->group.store(group, std::memory_order_relaxed);
}

}  // namespace

bool same_keys(const KeyLayout* a, const KeyLayout* b) {
    if (a == b) return true;
    if (a->size != b->size) return false;
    const std::uint64_t group = b->group.load(std::memory_order_relaxed);
    if (group != 0 && a->group.load(std::memory_order_relaxed) == group) return true;
    for (std::uint32_t i = 0; i < a->size; ++i) {
        if (!equal(a->keys[i], b->keys[i])) return false;
    }
    if (a->atomic && b->atomic) join_group(a, b, group);
    return true;
}

Ref make_layout_type() { return internal_class(checked(PyType_FromSpec(&layout_spec))); }
Ref make_loose_layout_type() {
    return internal_class(checked(PyType_FromSpec(&loose_layout_spec)));
}

}  // namespace optree
