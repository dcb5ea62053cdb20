// SPDX-License-Identifier: Apache-2.0
// What threads need to share memory where there is no interpreter lock. With the lock, all of it but
// the pointer of `Published` compiles to nothing.
//
//   CriticalSection   CPython's own lock of one object, while its items are copied
//   Published<T>      read without a lock inside a ReaderSection; replaced as a whole under a
//                     WriterLock, which waits until no thread reads the old value before it is freed;
//                     changed in place where the interpreter lock keeps readers out
//   Turn              one thread at a time, across calls of Python code (walk/iterate.cpp)
//
// No Python code runs in a ReaderSection or under a WriterLock.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "support/ref.h"

namespace optree {

#if defined(Py_GIL_DISABLED)

class CriticalSection {
  public:
    explicit CriticalSection(PyObject* object) noexcept {
        PyCriticalSection_Begin(&section_, object);
    }
    CriticalSection(const CriticalSection&) = delete;
    CriticalSection& operator=(const CriticalSection&) = delete;
    ~CriticalSection() { PyCriticalSection_End(&section_); }

  private:
    PyCriticalSection section_;
};

// What is inside is a few loads: it does not block, allocate or call Python.
class ReaderSection {
  public:
    ReaderSection() noexcept;
    ReaderSection(const ReaderSection&) = delete;
    ReaderSection& operator=(const ReaderSection&) = delete;
    ~ReaderSection();
};

// Returns when every reader section that was open at the call has been left.
void wait_for_readers() noexcept;

// Keeps alive what another thread might drop.
class Held {
  public:
    void hold(Ref object) noexcept { object_ = std::move(object); }

  private:
    Ref object_;
};

class Lock {
  public:
    void lock() noexcept { PyMutex_Lock(&mutex_); }
    void unlock() noexcept { PyMutex_Unlock(&mutex_); }

  private:
    PyMutex mutex_ = {};
};

#else

class CriticalSection {
  public:
    explicit CriticalSection(PyObject*) noexcept {}
};

class ReaderSection {
  public:
    ReaderSection() noexcept {}
};

inline void wait_for_readers() noexcept {}

// Nothing is dropped before Python code runs.
class Held {
  public:
    void hold(const Ref&) noexcept {}
};

class Lock {
  public:
    void lock() noexcept {}
    void unlock() noexcept {}
};

#endif

class WriterLock {
  public:
    explicit WriterLock(Lock& lock) noexcept : lock_(lock) { lock_.lock(); }
    WriterLock(const WriterLock&) = delete;
    WriterLock& operator=(const WriterLock&) = delete;
    ~WriterLock() { lock_.unlock(); }

  private:
    Lock& lock_;
};

template <class T>
class Published {
  public:
    Published() : value_(new T) {}
    Published(const Published&) = delete;
    Published& operator=(const Published&) = delete;
    ~Published() { delete value_.load(std::memory_order_relaxed); }

    // The value: until the end of the reader section, or of the writer lock, that the caller is in.
    const T& peek() const noexcept {
        return *value_.load(compat::kFreeThreaded ? std::memory_order_seq_cst
                                                  : std::memory_order_relaxed);
    }
    // Replaces the value by `next` and returns the old one when no thread reads it any more. Under the
    // writer lock.
    std::unique_ptr<T> publish(std::unique_ptr<T> next) noexcept {
        std::unique_ptr<T> old(value_.exchange(next.release()));
        wait_for_readers();
        return old;
    }
    // `change(value)`, under the writer lock: on a copy that is published after it, where readers may
    // be at the value itself. Registering a class takes 0.3 us with the interpreter lock, and 18 us
    // without it where 8000 are registered, for which every look-up is without a lock.
    template <class Change>
    void update(Change&& change) {
        if constexpr (compat::kFreeThreaded) {
            auto next = std::make_unique<T>(peek());
            change(*next);
            publish(std::move(next));
        } else {
            change(*value_.load(std::memory_order_relaxed));
        }
    }
    // Leaves an empty value; null, and the value stays, if there is no memory.
    std::unique_ptr<T> take() noexcept {
        std::unique_ptr<T> empty(new (std::nothrow) T);
        return empty ? publish(std::move(empty)) : nullptr;
    }

  private:
    std::atomic<T*> value_;
};

// One thread at a time. A thread that enters while another is inside waits without the interpreter
// lock; `enter` returns false to the thread that is inside already.
class Turn {
  public:
    Turn() = default;
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

#if defined(Py_GIL_DISABLED)
    bool is_free() const noexcept { return false; }  // unknown without entering
    bool enter() noexcept {
        PyThreadState* self = PyThreadState_Get();
        // Only this thread itself can have put itself there.
        if (owner_.load(std::memory_order_relaxed) == self) return false;
        PyMutex_Lock(&mutex_);
        owner_.store(self, std::memory_order_relaxed);
        return true;
    }
    void leave() noexcept {
        owner_.store(nullptr, std::memory_order_relaxed);
        PyMutex_Unlock(&mutex_);
    }

  private:
    std::atomic<PyThreadState*> owner_{nullptr};
    PyMutex mutex_ = {};
#else
    ~Turn() {
        if (lock_ != nullptr) PyThread_free_lock(lock_);
    }
    // Whether no thread is inside: it stays so as long as no Python code runs.
    bool is_free() const noexcept { return owner_ == nullptr; }
    bool enter() {
        PyThreadState* self = PyThreadState_Get();
        if (owner_ == self) return false;
        if (lock_ == nullptr && (lock_ = PyThread_allocate_lock()) == nullptr) {
            throw std::bad_alloc();
        }
        if (OPTREE_UNLIKELY(PyThread_acquire_lock(lock_, NOWAIT_LOCK) == 0)) wait();
        owner_ = self;
        return true;
    }
    void leave() noexcept {
        owner_ = nullptr;
        PyThread_release_lock(lock_);
    }

  private:
    OPTREE_COLD void wait();  // without the interpreter lock

    PyThreadState* owner_ = nullptr;
    PyThread_type_lock lock_ = nullptr;  // made by the first who enters
#endif
};

}  // namespace optree
