// resnet_fast._native.Guard: whether Python objects are still what they were.
//
// What a network's layers do depends on hundreds of attributes, children, hooks and parameters of
// its modules (resnet_fast/nn/sequence.py says which). Compared one by one in Python they take 0.45
// ms of a ResNet-50's forward at one image, here, by identity, 0.32: most of it are misses of the
// caches, which a forward has emptied.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace resnet_fast {

namespace py = pybind11;

class Guard {
 public:
  // The dict holds `value` under `key`, that very object.
  void same(const py::dict& where, const py::str& key, const py::object& value) {
    same_.push_back({where, key, value});
  }
  // The dict has no `key`.
  void absent(const py::dict& where, const py::str& key) { absent_.emplace_back(where, key); }
  // The dict is empty.
  void empty(const py::dict& where) { empty_.push_back(where); }
  // The dict has the items that it has now, in their order.
  void items(const py::dict& where) {
    Items now{where, {}};
    for (const auto& [key, value] : where) {
      now.items.emplace_back(py::reinterpret_borrow<py::object>(key),
                             py::reinterpret_borrow<py::object>(value));
    }
    items_.push_back(std::move(now));
  }
  // The object's class is the one that it is now.
  void type(const py::object& object) { types_.emplace_back(object, py::type::of(object)); }
  // The tensor's version and address are what they are now.
  void tensor(const py::object& tensor) {
    tensors_.push_back({tensor, tensor.attr("_version"), tensor.attr("data_ptr")()});
  }

  bool holds() const {
    for (const Same& s : same_) {
      if (PyDict_GetItemWithError(s.where.ptr(), s.key.ptr()) != s.value.ptr()) return failed();
    }
    for (const auto& [object, type] : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    }
    for (const py::dict& hooks : empty_) {
      if (PyDict_Size(hooks.ptr()) != 0) return failed();
    }
    for (const auto& [where, key] : absent_) {
      if (PyDict_GetItemWithError(where.ptr(), key.ptr()) != nullptr) return false;
    }
    for (const Items& i : items_) {
      if (!as_they_were(i)) return false;
    }
    for (const TensorState& t : tensors_) {
      if (!equal(t.tensor.attr("_version"), t.version)) return false;
      if (!equal(t.tensor.attr("data_ptr")(), t.pointer)) return false;
    }
    return !failed();
  }

  // A network holds its guard, and the guard the network's parts: the garbage collector has to see
  // through it. Types are left out, as they outlive their instances.
  int traverse(visitproc visit, void* arg) const {
    const auto each = [&](const py::object& o) { return visit_one(o.ptr(), visit, arg); };
    for (const Same& s : same_) {
      if (int stop = each(s.where); stop != 0) return stop;
      if (int stop = each(s.value); stop != 0) return stop;
    }
    for (const auto& [where, key] : absent_) {
      if (int stop = each(where); stop != 0) return stop;
    }
    for (const py::dict& hooks : empty_) {
      if (int stop = each(hooks); stop != 0) return stop;
    }
    for (const Items& i : items_) {
      if (int stop = each(i.where); stop != 0) return stop;
      for (const auto& [key, value] : i.items) {
        if (int stop = each(value); stop != 0) return stop;
      }
    }
    for (const auto& [object, type] : types_) {
      if (int stop = each(object); stop != 0) return stop;
    }
    for (const TensorState& t : tensors_) {
      if (int stop = each(t.tensor); stop != 0) return stop;
    }
    return 0;
  }

 private:
  static int visit_one(PyObject* object, visitproc visit, void* arg) {
    Py_VISIT(object);
    return 0;
  }
  struct Same {
    py::dict where;
    py::str key;
    py::object value;
  };
  struct Items {
    py::dict where;
    std::vector<std::pair<py::object, py::object>> items;
  };
  struct TensorState {
    py::object tensor, version, pointer;
  };

  // An error that a comparison left behind is the caller's to see.
  static bool failed() {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return false;
  }

  static bool equal(const py::object& a, const py::object& b) {
    const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (result < 0) throw py::error_already_set();
    return result == 1;
  }

  static bool as_they_were(const Items& now) {
    if (PyDict_Size(now.where.ptr()) != static_cast<Py_ssize_t>(now.items.size())) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    for (const auto& [known_key, known_value] : now.items) {
      if (PyDict_Next(now.where.ptr(), &at, &key, &value) == 0 || value != known_value.ptr()) {
        return false;
      }
      if (key != known_key.ptr() && !equal(py::reinterpret_borrow<py::object>(key), known_key)) {
        return false;
      }
    }
    return true;
  }

  std::vector<Same> same_;
  std::vector<std::pair<py::dict, py::str>> absent_;
  std::vector<py::dict> empty_;
  std::vector<Items> items_;
  std::vector<std::pair<py::object, py::object>> types_;
  std::vector<TensorState> tensors_;
};

// Python's own hooks for the collector. An instance may be looked at before it is initialised.
inline Guard* initialised_guard(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? static_cast<Guard*>(holder.value_ptr()) : nullptr;
}

inline int traverse_guard(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Guard* guard = initialised_guard(self);
  return guard == nullptr ? 0 : guard->traverse(visit, arg);
}

inline int clear_guard(PyObject* self) {
  if (Guard* guard = initialised_guard(self)) {
    const Guard old = std::move(*guard);  // gone before what it held is
    *guard = Guard();
  }
  return 0;
}

inline void define_guard(py::module_& m) {
  const py::custom_type_setup collected([](PyHeapTypeObject* heap) {
    heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    heap->ht_type.tp_traverse = &traverse_guard;
    heap->ht_type.tp_clear = &clear_guard;
  });
  py::class_<Guard>(m, "Guard", "Whether Python objects are still what they were when noted.",
                    collected)
      .def(py::init<>())
      .def("same", &Guard::same, "Note the object that a dict holds under a key.")
      .def("absent", &Guard::absent, "Note that a dict has no such key.")
      .def("empty", &Guard::empty, "Note that a dict is empty.")
      .def("items", &Guard::items, "Note the items of a dict, in their order.")
      .def("type", &Guard::type, "Note the class of an object.")
      .def("tensor", &Guard::tensor, "Note the version and the address of a tensor.")
      .def("holds", &Guard::holds, "Whether all that was noted still is so.");
}

}  // namespace resnet_fast
