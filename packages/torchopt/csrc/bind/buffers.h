// SPDX-License-Identifier: Apache-2.0
// Memory for new tensors, reused after the tensors are gone.
//
// Fresh memory from the system costs a page fault for every 4 KiB, which takes several times as long as the kernel that
// fills it. The C library returns large blocks to the system as soon as they are freed. An optimizer that returns a new
// state for each old one requests blocks of the same sizes in every step, so the blocks are kept for the next step. A
// block comes back when torch releases the storage made from it, that is, when the last tensor, view or graph that uses
// it is gone. Nothing is inferred from reference counts.
#pragma once

#include <cstddef>

namespace torchopt::buffers {

/// Returns a block of at least `bytes` bytes, aligned to 64.
void* take(std::size_t bytes);

/// Returns the block of `take(bytes)` to the store. Any thread may call this, with or without the interpreter lock.
void give_back(void* block, std::size_t bytes) noexcept;

/// Locks out other threads until `unlock`. Used around a fork, where a child would otherwise inherit a locked mutex.
void lock();
void unlock() noexcept;

/// Frees all unused blocks.
void release() noexcept;

/// Sets the limit on the total size of unused blocks that are kept. Returns the previous limit.
std::size_t set_limit(std::size_t bytes) noexcept;

/// Bytes in unused blocks, and bytes in blocks that are in use.
struct Usage {
    std::size_t kept, used;
};
Usage usage() noexcept;

}  // namespace torchopt::buffers
