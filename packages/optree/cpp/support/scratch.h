// SPDX-License-Identifier: Apache-2.0
// A growing array of trivially copyable values that starts on the C stack.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "cpython/gc_memory.h"

namespace optree {

// Memory that one call keeps for the next, with one block for each use. A walk over a tree that
// exceeds the inline buffers then neither allocates nor moves the values it collects. Makes flatten
// a tenth faster on module trees (benchmarks/optree). Holds at most kUses * kMaxBytes.
class BlockPool {
  public:
    enum Use : unsigned char { leaves, nodes, slots, pending, stack, kUses };
    struct Block {
        void* data = nullptr;
        std::size_t bytes = 0;
    };
    static constexpr std::size_t kMaxBytes = std::size_t{1} << 18;

    BlockPool() = default;
    BlockPool(const BlockPool&) = delete;
    BlockPool& operator=(const BlockPool&) = delete;
    ~BlockPool() { clear(); }

    Block take(Use use) noexcept {
        return kKeepsMemory ? std::exchange(blocks_[use], Block()) : Block();
    }
    void give(Use use, Block block) noexcept {
        if (kKeepsMemory && block.bytes <= kMaxBytes && block.bytes > blocks_[use].bytes) {
            std::swap(block, blocks_[use]);
        }
        PyMem_Free(block.data);
    }
    void clear() noexcept {
        for (Block& block : blocks_) PyMem_Free(std::exchange(block, Block()).data);
    }

  private:
    Block blocks_[kUses];
};

// A push is a compare, a store and an increment. The vectors of the standard library and of abseil
// need two to three times as many instructions (instruction counts of flatten,
// benchmarks/optree/instructions.py).
template <class T, std::size_t N>
class Scratch {
  public:
    static_assert(std::is_trivially_copyable_v<T>);
    Scratch() noexcept = default;
    // Values that exceed the inline buffer are stored in the pool's block for this use.
    Scratch(BlockPool& pool, BlockPool::Use use) noexcept : pool_(&pool), use_(use) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        if (OPTREE_UNLIKELY(data_ != inline_data())) release();
    }

    std::size_t size() const noexcept { return size_; }
    T* data() noexcept { return data_; }
    const T* data() const noexcept { return data_; }
    T* begin() noexcept { return data_; }
    T* end() noexcept { return data_ + size_; }
    T& operator[](std::size_t index) noexcept { return data_[index]; }

    OPTREE_INLINE void reserve(std::size_t extra) {
        if (OPTREE_UNLIKELY(extra > capacity_ - size_)) grow(extra);
    }
    OPTREE_INLINE void push(const T& value) {
        if (OPTREE_UNLIKELY(size_ == capacity_)) grow(1);
        data_[size_++] = value;
    }
    // The caller must have reserved room.
    OPTREE_INLINE void push_unchecked(const T& value) noexcept { data_[size_++] = value; }
    T pop() noexcept { return data_[--size_]; }
    // Drops values from `size` on, or adds values that were written after the end.
    void set_size(std::size_t size) noexcept { size_ = size; }

    // Moves the values into a block from PyMem_Malloc of the right size; null if memory runs out.
    T* detach() noexcept {
        T* block;
        if (data_ != inline_data() && capacity_ * sizeof(T) > BlockPool::kMaxBytes) {
            block = static_cast<T*>(PyMem_Realloc(static_cast<void*>(data_), size_ * sizeof(T)));
            if (block == nullptr) return nullptr;
            data_ = inline_data();
            capacity_ = N;
        } else {
            block = static_cast<T*>(PyMem_Malloc(size_ * sizeof(T)));
            if (block == nullptr) return nullptr;
            std::memcpy(static_cast<void*>(block), data_, size_ * sizeof(T));
        }
        size_ = 0;
        return block;
    }

  private:
    T* inline_data() noexcept { return reinterpret_cast<T*>(inline_); }

    OPTREE_NOINLINE void release() noexcept {
        if (pool_ != nullptr) {
            pool_->give(use_, {static_cast<void*>(data_), capacity_ * sizeof(T)});
        } else {
            PyMem_Free(static_cast<void*>(data_));
        }
    }

    OPTREE_NOINLINE void grow(std::size_t extra) {
        if (extra > PTRDIFF_MAX / sizeof(T) - size_) throw std::bad_alloc();
        const std::size_t needed = size_ + extra;
        std::size_t capacity = capacity_ * 2 > needed ? capacity_ * 2 : needed;
        if (capacity > PTRDIFF_MAX / sizeof(T)) throw std::bad_alloc();
        void* data = nullptr;
        if (data_ != inline_data()) {
            data = PyMem_Realloc(static_cast<void*>(data_), capacity * sizeof(T));
            if (data == nullptr) throw std::bad_alloc();
        } else {
            BlockPool::Block kept = pool_ != nullptr ? pool_->take(use_) : BlockPool::Block();
            if (kept.bytes >= needed * sizeof(T)) {
                data = kept.data;
                capacity = kept.bytes / sizeof(T);
            } else {
                PyMem_Free(kept.data);
                data = PyMem_Malloc(capacity * sizeof(T));
            }
            if (data == nullptr) throw std::bad_alloc();
            std::memcpy(data, inline_, size_ * sizeof(T));
        }
        data_ = static_cast<T*>(data);
        capacity_ = capacity;
    }

    T* data_ = inline_data();
    std::size_t size_ = 0;
    std::size_t capacity_ = N;
    BlockPool* pool_ = nullptr;
    BlockPool::Use use_ = BlockPool::leaves;
    alignas(T) unsigned char inline_[N * sizeof(T)];
};

}  // namespace optree
