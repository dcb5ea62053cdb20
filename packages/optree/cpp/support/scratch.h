// SPDX-License-Identifier: Apache-2.0
// A growing array of trivially copyable values that starts on the C stack.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "support/compat.h"

namespace optree {

// A push is a compare, a store and an increment; the vectors of the standard library and of abseil
// cost two to three times that (instruction counts of flatten, benchmarks/optree/instructions.py).
template <class T, std::size_t N>
class Scratch {
  public:
    static_assert(std::is_trivially_copyable_v<T>);
    Scratch() noexcept = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        if (OPTREE_UNLIKELY(data_ != inline_data())) std::free(data_);
    }

    std::size_t size() const noexcept { return size_; }
    T* data() noexcept { return data_; }
    const T* data() const noexcept { return data_; }
    T* begin() noexcept { return data_; }
    T* end() noexcept { return data_ + size_; }
    T& operator[](std::size_t index) noexcept { return data_[index]; }

    void reserve(std::size_t extra) {
        if (OPTREE_UNLIKELY(extra > capacity_ - size_)) grow(size_ + extra);
    }
    OPTREE_INLINE void push(const T& value) {
        if (OPTREE_UNLIKELY(size_ == capacity_)) grow(size_ + 1);
        data_[size_++] = value;
    }
    // Room must have been reserved.
    OPTREE_INLINE void push_unchecked(const T& value) noexcept { data_[size_++] = value; }
    T pop() noexcept { return data_[--size_]; }
    // Forgets values from `size` on, or counts those as there that were written behind the end.
    void set_size(std::size_t size) noexcept { size_ = size; }

  private:
    T* inline_data() noexcept { return reinterpret_cast<T*>(inline_); }

    OPTREE_NOINLINE void grow(std::size_t needed) {
        const std::size_t capacity = capacity_ * 2 > needed ? capacity_ * 2 : needed;
        if (capacity > PTRDIFF_MAX / sizeof(T)) throw std::bad_alloc();
        const bool was_inline = data_ == inline_data();
        void* data = was_inline ? std::malloc(capacity * sizeof(T))
                                : std::realloc(static_cast<void*>(data_), capacity * sizeof(T));
        if (data == nullptr) throw std::bad_alloc();
        if (was_inline) std::memcpy(data, inline_, size_ * sizeof(T));
        data_ = static_cast<T*>(data);
        capacity_ = capacity;
    }

    T* data_ = inline_data();
    std::size_t size_ = 0;
    std::size_t capacity_ = N;
    alignas(T) unsigned char inline_[N * sizeof(T)];
};

}  // namespace optree
