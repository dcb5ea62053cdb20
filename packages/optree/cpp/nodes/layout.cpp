// SPDX-License-Identifier: Apache-2.0
#include "nodes/layout.h"

#include <algorithm>
#include <vector>

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

// No tp_clear: a layout never changes, so every cycle through it contains another object that can
// be cleared.
PyType_Slot layout_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(layout_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(layout_traverse)},
    {0, nullptr},
};

bool all_atomic(PyObject* const* keys, std::size_t size) noexcept {
    for (std::size_t i = 0; i < size; ++i) {
        if (!is_atomic(keys[i])) return false;
    }
    return true;
}

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
    // kNone if the object is not in the array.
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

// Records that two layouts have equal keys, which never changes. All layouts with the same group
// number are equal, in whatever order threads get here.
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

// The arrays follow the object: inserted[size], then keys[size], position[size] and order[size] if
// the two orders differ.
Ref make_layout_in_order(LayoutTypes types, PyObject* const* inserted, std::size_t size,
                         const std::uint32_t* order, bool sorted) {
    const std::uint32_t count = checked_count(size);
    const bool atomic = all_atomic(inserted, size);
    constexpr std::size_t places =
        (2 * sizeof(std::uint32_t) + sizeof(PyObject*) - 1) / sizeof(PyObject*);
    const std::size_t words = order != nullptr ? (2 + places) * size : size;
    const auto extra = static_cast<Py_ssize_t>(words);
    auto* layout = atomic ? PyObject_NewVar(KeyLayout, types.atomic, extra)
                          : PyObject_GC_NewVar(KeyLayout, types.loose, extra);
    if (layout == nullptr) throw PythonError{};
    layout->size = count;
    layout->atomic = atomic;
    layout->sorted = sorted;
    layout->shape = shape_of(count, sorted);
    layout->bytes = 0;
    new (&layout->hash) std::atomic<std::uint64_t>(0);
    new (&layout->group) std::atomic<std::uint64_t>(0);
    new (&layout->prototype) std::atomic<PyObject*>(nullptr);
    new (&layout->entries) std::atomic<PyObject*>(nullptr);
    PyObject** own = layout->inserted;
    layout->keys = order != nullptr ? own + size : own;
    layout->position =
        order != nullptr ? reinterpret_cast<std::uint32_t*>(layout->keys + size) : nullptr;
    layout->order = order != nullptr ? layout->position + size : nullptr;
    for (std::uint32_t i = 0; i < count; ++i) own[i] = compat::new_ref(inserted[i]);
    if (order != nullptr) {
        std::copy_n(order, size, layout->order);
        for (std::uint32_t child = 0; child < count; ++child) {
            layout->keys[child] = inserted[order[child]];
            layout->position[order[child]] = child;
        }
    }
    if (!atomic) PyObject_GC_Track(reinterpret_cast<PyObject*>(layout));
    return Ref::steal(reinterpret_cast<PyObject*>(layout));
}

Ref make_layout(LayoutTypes types, PyObject* const* inserted, std::size_t size, bool sorted) {
    KeyOrder order;
    const bool permuted = sorted && size > 1 && sort_keys(inserted, size, order);
    return make_layout_in_order(types, inserted, size, permuted ? order.data() : nullptr, sorted);
}

Ref positions_of(PyObject* const* keys, std::size_t size) {
    Ref positions = checked(PyDict_New());
    for (std::size_t i = 0; i < size; ++i) {
        const Ref number = checked(PyLong_FromSize_t(i));
        set_item(positions.get(), keys[i], number.get());
    }
    return positions;
}

std::size_t position_in(PyObject* positions, PyObject* key, std::size_t size) {
    const Ref number = item_of(positions, key);
    // The number may be missing: code can reach the dict through gc.get_objects().
    if (!number || !PyLong_CheckExact(number.get())) return size;
    const std::size_t position = PyLong_AsSize_t(number.get());
    if (PyErr_Occurred()) PyErr_Clear();
    return std::min(position, size);
}

Ref make_layout_with_order(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                           std::size_t size) {
    const Ref positions = positions_of(inserted, size);
    std::vector<std::uint32_t> order(size);
    std::vector<bool> taken(size, false);  // keys with an inconsistent __eq__ must not leave holes
    bool permuted = false;
    for (std::size_t child = 0; child < size; ++child) {
        const std::size_t at = position_in(positions.get(), keys[child], size);
        if (at == size || taken[at]) {
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        order[child] = static_cast<std::uint32_t>(at);
        taken[at] = true;
        permuted = permuted || at != child;
    }
    return make_layout_in_order(types, inserted, size, permuted ? order.data() : nullptr, true);
}

Ref make_layout_of_sorted(LayoutTypes types, PyObject* const* keys, PyObject* const* inserted,
                          std::size_t size) {
    if (!strictly_increasing(keys, size)) return nullptr;
    if (std::equal(keys, keys + size, inserted)) {
        return make_layout_in_order(types, inserted, size, nullptr, true);
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
    return make_layout_in_order(types, inserted, size, order.data(), true);
}

bool is_layout(PyObject* object) noexcept { return Py_TYPE(object)->tp_dealloc == layout_dealloc; }

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

Ref make_layout_type(bool loose) {
    const unsigned long flags = loose ? Py_TPFLAGS_HAVE_GC : 0;
    PyType_Spec spec = {
        loose ? "optree._C.LooseKeyLayout" : "optree._C.KeyLayout",
        static_cast<int>(offsetof(KeyLayout, inserted)),
        static_cast<int>(sizeof(PyObject*)),
        static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | compat::kNoInstantiation | flags),
        layout_slots,
    };
    return internal_class(checked(PyType_FromSpec(&spec)));
}

}  // namespace optree
