// SPDX-License-Identifier: Apache-2.0
#include "nodes/layout.h"

#include <algorithm>
#include <cstring>

#include "nodes/gather.h"
#include "nodes/look_ahead.h"
#include "nodes/sort_keys.h"
#include "support/errors.h"

namespace optree {
namespace {

void layout_dealloc(PyObject* self) {
    auto* layout = reinterpret_cast<KeyLayout*>(self);
    for (std::uint32_t i = 0; i < layout->size; ++i) Py_XDECREF(layout->inserted[i]);
    Py_XDECREF(layout->prototype.load());
    Py_XDECREF(layout->entries.load());
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot layout_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(layout_dealloc)},
    {0, nullptr},
};

PyType_Spec layout_spec = {
    "optree._C.KeyLayout",
    sizeof(KeyLayout),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | compat::kNoInstantiation),
    layout_slots,
};

// The arrays follow the object: inserted[size], then keys[size] and position[size] when the orders
// differ. Takes a reference to each key.
Ref fill_layout(PyTypeObject* type, PyObject* const* inserted, std::size_t size,
                const std::uint32_t* order, bool sorted) {
    const std::uint32_t count = checked_count(size);
    const std::size_t bytes =
        size *
        (order != nullptr ? 2 * sizeof(PyObject*) + sizeof(std::uint32_t) : sizeof(PyObject*));
    void* block = PyObject_Malloc(offsetof(KeyLayout, inserted) + bytes);
    if (block == nullptr) throw std::bad_alloc();
    auto* layout = reinterpret_cast<KeyLayout*>(PyObject_Init(static_cast<PyObject*>(block), type));
    layout->size = count;
    layout->atomic = true;
    layout->sorted = sorted;
    new (&layout->hash) std::atomic<std::uint64_t>(0);
    new (&layout->group) std::atomic<std::uint64_t>(0);
    new (&layout->prototype) std::atomic<PyObject*>(nullptr);
    new (&layout->entries) std::atomic<PyObject*>(nullptr);
    PyObject** own = layout->inserted;
    layout->keys = order != nullptr ? own + size : own;
    layout->position =
        order != nullptr ? reinterpret_cast<std::uint32_t*>(layout->keys + size) : nullptr;
    for (std::uint32_t i = 0; i < count; ++i) {
        own[i] = compat::new_ref(inserted[i]);
        layout->atomic = layout->atomic && is_atomic(inserted[i]);
    }
    if (order != nullptr) {
        for (std::uint32_t child = 0; child < count; ++child) {
            layout->keys[child] = inserted[order[child]];
            layout->position[order[child]] = child;
        }
    }
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

void LayoutCache::offer(KeyLayout* layout) noexcept {
    if (!layout->atomic || layout->size == 0 || layout->size > kMaxKeys / 4) return;
    PyObject* first = layout->inserted[0];
    if (meet(layout, first) != 0) keep(layout);
    if (!PyUnicode_CheckExact(first)) return;
    const Py_hash_t hash = PyObject_Hash(first);
    if (meet(met_twins_, mix(static_cast<std::uint64_t>(hash), layout->size, layout->sorted)) !=
        0) {
        insert(twin_set(hash, layout->size, layout->sorted), layout);
    }
}

void LayoutCache::insert(Set& set, KeyLayout* layout) noexcept {
    if (keys_ + layout->size > kMaxKeys) clear();
    KeyLayout* oldest = set[kWays - 1];
    for (std::size_t way = kWays - 1; way > 0; --way) set[way] = set[way - 1];
    Py_INCREF(reinterpret_cast<PyObject*>(layout));
    set[0] = layout;
    keys_ += layout->size;
    if (oldest != nullptr) {
        keys_ -= oldest->size;
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
    keys_ = 0;
}

namespace {

// A layout of equal keys that are other objects.
Ref copy_layout(PyTypeObject* layout_type, const KeyLayout* layout, PyObject* const* inserted) {
    KeyOrder order;
    if (layout->position != nullptr) {
        order.reserve(layout->size);
        order.set_size(layout->size);
        for (std::uint32_t i = 0; i < layout->size; ++i) order[layout->position[i]] = i;
    }
    return fill_layout(layout_type, inserted, layout->size,
                       layout->position != nullptr ? order.data() : nullptr, layout->sorted);
}

}  // namespace

Ref make_layout(PyTypeObject* layout_type, PyObject* const* inserted, std::size_t size,
                bool sorted) {
    KeyOrder order;
    const bool permuted = sorted && size > 1 && sort_keys(inserted, size, order);
    return fill_layout(layout_type, inserted, size, permuted ? order.data() : nullptr, sorted);
}

Ref make_layout_with_order(PyTypeObject* layout_type, PyObject* keys, PyObject* inserted) {
    const auto size = static_cast<std::size_t>(PyList_GET_SIZE(keys));
    if (PyList_GET_SIZE(inserted) != PyList_GET_SIZE(keys)) {
        raise(PyExc_KeyError, "the two key orders hold different keys");
    }
    Ref index = checked(PyDict_New());
    for (std::size_t i = 0; i < size; ++i) {
        Ref number = checked(PyLong_FromSize_t(i));
        PyObject* key = PyList_GET_ITEM(inserted, static_cast<Py_ssize_t>(i));
        check_status(PyDict_SetItem(index.get(), key, number.get()));
    }
    std::vector<std::uint32_t> order(size);
    std::vector<bool> taken(size, false);  // keys whose __eq__ lies must not make holes
    bool permuted = false;
    for (std::size_t child = 0; child < size; ++child) {
        PyObject* key = PyList_GET_ITEM(keys, static_cast<Py_ssize_t>(child));
        PyObject* number = PyDict_GetItemWithError(index.get(), key);
        if (number == nullptr) {
            if (PyErr_Occurred()) throw PythonError{};
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        order[child] = static_cast<std::uint32_t>(PyLong_AsUnsignedLong(number));
        if (taken[order[child]]) {
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        taken[order[child]] = true;
        permuted = permuted || order[child] != child;
    }
    PyObject** items = reinterpret_cast<PyListObject*>(inserted)->ob_item;
    return fill_layout(layout_type, items, size, permuted ? order.data() : nullptr, true);
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

Ref make_layout_of_sorted(PyTypeObject* layout_type, PyObject* const* keys,
                          PyObject* const* inserted, std::size_t size) {
    if (!strictly_increasing(keys, size)) return nullptr;
    if (std::equal(keys, keys + size, inserted)) {
        return fill_layout(layout_type, inserted, size, nullptr, true);
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
    return fill_layout(layout_type, inserted, size, order.data(), true);
}

namespace {

// Equality of atomic keys that runs no Python code; of ints by identity only.
bool same_text_or_object(PyObject* a, PyObject* b) noexcept {
    if (a == b) return true;
    if (!PyUnicode_CheckExact(a) || !PyUnicode_CheckExact(b)) return false;
    const auto kind = PyUnicode_KIND(a);
    const Py_ssize_t length = PyUnicode_GET_LENGTH(a);
    return PyUnicode_KIND(b) == kind && PyUnicode_GET_LENGTH(b) == length &&
           std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b),
                       static_cast<std::size_t>(length) * static_cast<std::size_t>(kind)) == 0;
}

}  // namespace

bool push_known_values(const KeyLayout* layout, bool entries_readable, PyObject* mapping,
                       ObjectStack& values) {
    const CriticalSection reading(mapping);
    const std::size_t size = layout->size;
    if (PyDict_GET_SIZE(mapping) != static_cast<Py_ssize_t>(size)) return false;
    if (size == 0) return true;
    values.reserve(size);
    PyObject** out = values.data() + values.size();
    if (!keys_match(layout, entries_of(entries_readable, mapping), mapping, out, identical))
        return false;
    for (std::size_t i = 0; i < size; ++i) Py_INCREF(out[i]);
    values.adopt(size);
    return true;
}

namespace {

// Keys that only Python code can compare, and the values under them in the same order.
Ref scan_by_python(PyTypeObject* layout_type, ObjectStack& keys, ObjectStack& unordered,
                   ObjectStack& values) {
    Ref owner = make_layout(layout_type, keys.data(), keys.size(), true);
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
    if (!PyUnicode_CheckExact(first)) return nullptr;
    const auto same = [&](std::uint32_t i, PyObject* key, PyObject* expected) {
        if (i % kBatch == 0) entries.prefetch(i, std::min(kBatch, size - i));
        return same_text_or_object(key, expected);
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

Ref scan_unknown(LayoutCache& cache, PyTypeObject* layout_type, PyObject* mapping, bool sorted,
                 ObjectStack& values) {
    ObjectStack own_keys;
    ObjectStack own_values;
    {
        const CriticalSection reading(mapping);  // while keys and values are borrowed
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
        if (size == 0) return Ref::borrow(cache.empty.get());
        const DictEntries entries = entries_of(cache.entries_readable, mapping);
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
                owner = copy_layout(layout_type, twin, keys.data());
                cache.keep(as_layout(owner.get()));
            } else {
                if (sorted) plain = sort_plain_keys(keys.data(), size, order);
                if (plain != Plain::not_plain) {
                    owner = fill_layout(layout_type, keys.data(), size,
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
            look_at_keys(out, size, cache.entries_readable);
            values.adopt(size);
            return owner;
        }
    }
    return scan_by_python(layout_type, own_keys, own_values, values);
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
    return keep(layout->prototype, prototype);
}

}  // namespace

PyObject* new_dict_of(KeyLayout* layout, bool entries_readable, PyObject** children) {
    if (!entries_readable || !layout->atomic || layout->size == 0) {
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
        Ref made = checked(PyTuple_New(layout->size));
        for (std::uint32_t i = 0; i < layout->size; ++i) {
            PyTuple_SET_ITEM(made.get(), i, compat::new_ref(layout->keys[i]));
        }
        // The garbage collector does not look into layouts: what they keep must not form cycles.
        if (!layout->atomic) return made;
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

}  // namespace optree
