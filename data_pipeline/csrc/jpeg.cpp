// Squares of a JPEG at the sizes asked for: libjpeg-turbo gives light and colours as they are stored, a band of
// rows at a time, and resample.h makes pixels of them while they are in the CPU's cache. Nothing is interpolated
// or turned to RGB at the picture's size.
//
// What libjpeg-turbo so much as warns of is not decoded here; the caller has a decoder that says what is wrong.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <csetjmp>
#include <cstdio>
#include <memory>
#include <string>

#include <jpeglib.h>

#include "resample.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "jpeglib.h is not libjpeg-turbo's"
#endif
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace {

using resample::Filter;
using resample::Kind;

#if JPEG_LIB_VERSION >= 70
int block_width(const jpeg_component_info& own) { return own.DCT_h_scaled_size; }
int block_height(const jpeg_component_info& own) { return own.DCT_v_scaled_size; }
int least_block(const jpeg_decompress_struct& jpeg) { return jpeg.min_DCT_v_scaled_size; }
#else
int block_width(const jpeg_component_info& own) { return own.DCT_scaled_size; }
int block_height(const jpeg_component_info& own) { return own.DCT_scaled_size; }
int least_block(const jpeg_decompress_struct& jpeg) { return jpeg.min_DCT_scaled_size; }
#endif

constexpr int HELD = 32;  // rows of values kept beside those of a band: the more, the more rarely they are moved
constexpr Py_ssize_t MOST = 16;  // squares of one picture
constexpr char EXIF[6] = {'E', 'x', 'i', 'f', 0, 0};

struct Square {
    uint8_t* pixels;  // [size][size][3]
    int size;
};

struct Box {
    double left, top, width, height;
    bool mirrored;
};

// One of light and colours: the band of rows that is decoded at a time.
struct Plane {
    int width, height, rows;  // of what is decoded; rows of a band
    size_t stride;
    std::vector<uint8_t> pixels;
    std::vector<JSAMPROW> pointers;

    explicit Plane(const jpeg_component_info& own)
        : width(int(own.downsampled_width)),
          height(int(own.downsampled_height)),
          rows(own.v_samp_factor * block_height(own)),
          stride((own.width_in_blocks + own.h_samp_factor) * block_width(own) + resample::BEYOND),
          pixels(stride * rows),
          pointers(rows) {
        for (int row = 0; row < rows; row++) pointers[row] = &pixels[row * stride];
    }
};

// How planes of a size are brought to a square.
struct Filters {
    Filter across, down;
    resample::Rows along;

    // `coarse`: there are fewer pixels of this plane than of light, along rows and along columns.
    Filters(const Plane& plane, const Box& box, int size, const bool (&coarse)[2], bool vectors)
        : across(box.left, box.width, size, plane.width, kind(box.width, size, coarse[0]), box.mirrored),
          down(box.top, box.height, size, plane.height, kind(box.height, size, coarse[1])),
          along(across, vectors) {}

    Filters(const Filters&) = delete;

    // What is coarse lies on lines from pixel to pixel, as in libjpeg's own interpolation.
    static Kind kind(double side, int size, bool coarse) {
        if (coarse) return Kind::linear;
        return side >= size ? Kind::area : Kind::cubic;
    }
};

// A plane's way to a square: the rows of values that are still needed, of those that have come.
struct Way {
    std::shared_ptr<const Filters> filters;
    int width, begin, end;        // rows begin up to end are held
    std::vector<int16_t> values;  // [room for rows][width]

    Way(std::shared_ptr<const Filters> own, int band)
        : filters(std::move(own)),
          width(resample::padded(filters->down.size)),
          begin(filters->down.begin),
          end(begin),
          values(size_t(band + filters->down.taps + HELD) * width) {}

    // Take the next row; value `next` is the first that is still to be given.
    void take(const uint8_t* pixels, int row, int next) {
        if (row < end || row >= filters->down.end) return;
        const size_t full = values.size();
        if (size_t(end - begin) * width == full) {
            const int needed = filters->down.first[next];
            std::copy(values.begin() + ptrdiff_t(needed - begin) * width, values.end(), values.begin());
            if (needed == begin) values.resize(2 * full);
            begin = needed;
        }
        filters->along(pixels, &values[size_t(end - begin) * width]);
        end++;
    }

    bool ready(int i) const { return filters->down.first[i] + filters->down.count[i] <= end; }

    void give(int i, int16_t* out, bool vectors) const {
        const Filter& down = filters->down;
        resample::column(&values[size_t(down.first[i] - begin) * width], &down.weights[size_t(i) * down.taps],
                         down.count[i], width, out, vectors);
    }
};

struct Errors {
    jpeg_error_mgr base;
    std::jmp_buf back;
};

void give_up(j_common_ptr jpeg) { std::longjmp(reinterpret_cast<Errors*>(jpeg->err)->back, 1); }
void say_nothing(j_common_ptr) {}
void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) give_up(jpeg);  // a warning: the file is damaged
}

// libjpeg's functions leave by longjmp where they give up, past every destructor: what has one lives outside of the
// functions that call them.
class Jpeg {
   public:
    Jpeg(const uint8_t* data, size_t size) : data_(data), size_(size) {
        jpeg_.err = jpeg_std_error(&errors_.base);
        errors_.base.error_exit = give_up;
        errors_.base.emit_message = on_message;
        errors_.base.output_message = say_nothing;
    }
    ~Jpeg() { jpeg_destroy_decompress(&jpeg_); }
    Jpeg(const Jpeg&) = delete;

    // Read what comes before the pixels; false when this is nothing for us.
    bool open() {
        if (setjmp(errors_.back)) return false;
        jpeg_create_decompress(&jpeg_);
        jpeg_mem_src(&jpeg_, data_, static_cast<unsigned long>(size_));
        jpeg_save_markers(&jpeg_, JPEG_APP0 + 1, sizeof EXIF);
        jpeg_read_header(&jpeg_, TRUE);
        const bool grey = jpeg_.jpeg_color_space == JCS_GRAYSCALE && jpeg_.num_components == 1;
        return grey || (jpeg_.jpeg_color_space == JCS_YCbCr && jpeg_.num_components == 3);
    }

    bool has_exif() const {
        for (auto marker = jpeg_.marker_list; marker != nullptr; marker = marker->next)
            if (marker->data_length == sizeof EXIF && std::memcmp(marker->data, EXIF, sizeof EXIF) == 0) return true;
        return false;
    }

    int width() const { return int(jpeg_.image_width); }
    int height() const { return int(jpeg_.image_height); }

    // Begin to decode at 1/factor of the size.
    bool start(int factor) {
        if (setjmp(errors_.back)) return false;
        jpeg_.scale_num = 1;
        jpeg_.scale_denom = unsigned(factor);
        jpeg_.out_color_space = jpeg_.jpeg_color_space;
        jpeg_.raw_data_out = TRUE;
        jpeg_start_decompress(&jpeg_);
        return true;
    }

    std::vector<Plane> planes() const {
        return {jpeg_.comp_info, jpeg_.comp_info + jpeg_.num_components};
    }

    // How many of a plane's pixels there are to one of the picture.
    double across(int plane) const {
        const auto& own = jpeg_.comp_info[plane];
        return double(own.h_samp_factor * block_width(own)) / (jpeg_.max_h_samp_factor * DCTSIZE);
    }
    double down(int plane) const {
        const auto& own = jpeg_.comp_info[plane];
        return double(own.v_samp_factor * block_height(own)) / (jpeg_.max_v_samp_factor * DCTSIZE);
    }

    // Decode the next band of all planes.
    bool band(JSAMPARRAY* rows) {
        if (setjmp(errors_.back)) return false;
        jpeg_read_raw_data(&jpeg_, rows, unsigned(jpeg_.max_v_samp_factor * least_block(jpeg_)));
        return true;
    }

    bool more() const { return jpeg_.output_scanline < jpeg_.output_height; }

    bool finish() {
        if (setjmp(errors_.back)) return false;
        jpeg_finish_decompress(&jpeg_);
        return true;
    }

   private:
    const uint8_t* data_;
    size_t size_;
    jpeg_decompress_struct jpeg_{};
    Errors errors_{};
};

// A square that is being filled, from the top.
struct Drawing {
    Square square;
    bool vectors;
    std::vector<Way> ways;  // of light and colours
    std::vector<int16_t> rows[3];
    int next = 0;

    Drawing(const Square& own, bool vectors) : square(own), vectors(vectors) {
        for (auto& row : rows) row.assign(resample::padded(square.size), resample::MIDDLE);
    }

    void take(std::vector<Plane>& planes, int number) {
        for (size_t p = 0; p < planes.size(); p++)
            for (int row = 0; row < planes[p].rows; row++)
                ways[p].take(planes[p].pointers[row], number * planes[p].rows + row, next);
        for (; next < square.size; next++) {
            for (size_t p = 0; p < planes.size(); p++)
                if (!ways[p].ready(next)) return;
            for (size_t p = 0; p < planes.size(); p++) ways[p].give(next, rows[p].data(), vectors);
            resample::colours(rows[0].data(), rows[1].data(), rows[2].data(), square.size,
                              square.pixels + size_t(3) * square.size * next, vectors);
        }
    }
};

// `jpeg` is open. False when it is damaged.
bool decode(Jpeg& jpeg, int factor, const Box& box, const std::vector<Square>& squares, bool vectors) {
    if (!jpeg.start(factor)) return false;
    std::vector<Plane> planes = jpeg.planes();
    std::vector<JSAMPARRAY> bands;
    for (auto& plane : planes) bands.push_back(plane.pointers.data());
    std::vector<Drawing> drawings;
    for (const Square& square : squares) {
        auto& ways = drawings.emplace_back(square, vectors).ways;
        for (int p = 0; p < int(planes.size()); p++) {
            const double x = jpeg.across(p), y = jpeg.down(p);
            const Box own{box.left * x, box.top * y, box.width * x, box.height * y, box.mirrored};
            const bool coarse[2] = {x < jpeg.across(0), y < jpeg.down(0)};
            const bool alike = p == 2 && jpeg.across(1) == x && jpeg.down(1) == y;
            ways.emplace_back(alike ? ways[1].filters
                                    : std::make_shared<const Filters>(planes[p], own, square.size, coarse, vectors),
                              planes[p].rows);
        }
    }
    for (int number = 0; jpeg.more(); number++) {
        if (!jpeg.band(bands.data())) return false;
        for (auto& drawing : drawings) drawing.take(planes, number);
    }
    for (const auto& drawing : drawings)
        if (drawing.next < drawing.square.size) return false;
    return jpeg.finish();
}

struct Buffer {
    Py_buffer view{};
    ~Buffer() { PyBuffer_Release(&view); }
};

// True when the squares are filled; or Python's error.
PyObject* filled(Jpeg& jpeg, int factor, const Box& box, const std::vector<Square>& squares, bool vectors) {
    if (!(box.left >= 0 && box.top >= 0 && box.width > 0 && box.left + box.width <= jpeg.width() &&
          box.top + box.height <= jpeg.height())) {
        PyErr_SetString(PyExc_ValueError, "the square must lie within the picture");
        return nullptr;
    }
    bool done = false;
    std::string wrong;
    Py_BEGIN_ALLOW_THREADS;
    try {
        done = decode(jpeg, factor, box, squares, vectors && resample::has_vectors());
    } catch (const std::exception& error) {  // memory
        wrong = error.what();
    }
    Py_END_ALLOW_THREADS;
    if (wrong.empty()) return PyBool_FromLong(done);
    PyErr_SetString(PyExc_MemoryError, wrong.c_str());
    return nullptr;
}

// The arguments that all functions begin with: the file, and the squares to fill.
struct Given {
    Buffer blob;
    std::vector<Buffer> buffers;
    std::vector<Square> squares;

    // False, with Python's error set, when they are not such.
    bool take(PyObject* out) {
        const Py_ssize_t count = PySequence_Size(out);
        if (count < 0) return false;
        if (count > MOST) {
            PyErr_SetString(PyExc_ValueError, "too many squares");
            return false;
        }
        buffers = std::vector<Buffer>(size_t(count));
        for (Py_ssize_t i = 0; i < count; i++) {
            PyObject* one = PySequence_GetItem(out, i);
            if (one == nullptr) return false;
            Py_buffer& view = buffers[size_t(i)].view;
            const int failed = PyObject_GetBuffer(one, &view, PyBUF_WRITABLE | PyBUF_ND);
            Py_DECREF(one);
            if (failed) return false;
            if (view.ndim != 3 || view.itemsize != 1 || view.shape[0] < 1 || view.shape[0] > 1 << 16 ||
                view.shape[1] != view.shape[0] || view.shape[2] != 3) {
                PyErr_SetString(PyExc_ValueError, "each square must be uint8 [size, size, 3]");
                return false;
            }
            squares.push_back({static_cast<uint8_t*>(view.buf), int(view.shape[0])});
        }
        return true;
    }

    Jpeg jpeg() const { return Jpeg(static_cast<const uint8_t*>(blob.view.buf), size_t(blob.view.len)); }
};

PyObject* size_of(PyObject*, PyObject* arguments) {
    Given given;
    if (!PyArg_ParseTuple(arguments, "y*", &given.blob.view)) return nullptr;
    Jpeg jpeg = given.jpeg();
    if (!jpeg.open()) Py_RETURN_NONE;
    return Py_BuildValue("ii", jpeg.width(), jpeg.height());
}

PyObject* part_of(PyObject*, PyObject* arguments) {
    Given given;
    PyObject* out;
    int factor, mirrored, vectors = 1;
    Box box;
    if (!PyArg_ParseTuple(arguments, "y*Oi(ddd)p|p", &given.blob.view, &out, &factor, &box.left, &box.top, &box.width,
                          &mirrored, &vectors) ||
        !given.take(out))
        return nullptr;
    box.height = box.width;
    box.mirrored = mirrored;
    if (factor != 1 && factor != 2 && factor != 4 && factor != 8) {
        PyErr_SetString(PyExc_ValueError, "factor must be 1, 2, 4 or 8");
        return nullptr;
    }
    Jpeg jpeg = given.jpeg();
    if (!jpeg.open()) Py_RETURN_FALSE;
    return filled(jpeg, factor, box, given.squares, vectors);
}

PyObject* view_of(PyObject*, PyObject* arguments) {
    Given given;
    PyObject* out;
    int target, mirrored;
    Py_ssize_t most;
    double share, left, top;
    if (!PyArg_ParseTuple(arguments, "y*Oin(ddd)p", &given.blob.view, &out, &target, &most, &share, &left, &top,
                          &mirrored) ||
        !given.take(out))
        return nullptr;
    if (target < 1 || target > 1 << 20) {
        PyErr_SetString(PyExc_ValueError, "target must be from 1 to 2 ** 20");
        return nullptr;
    }
    Jpeg jpeg = given.jpeg();
    if (!jpeg.open() || Py_ssize_t(jpeg.width()) * jpeg.height() > most) Py_RETURN_FALSE;
    if (jpeg.has_exif()) Py_RETURN_NONE;
    // decode.reduction and views.View.box, which are what the tests hold this to.
    const int shorter = std::min(jpeg.width(), jpeg.height()), times = shorter / (2 * target);
    const int factor = times >= 8 ? 8 : times >= 4 ? 4 : times >= 2 ? 2 : 1;
    const double side = std::max(1.0, share * shorter);
    const Box box{std::trunc((jpeg.width() - side) * left), std::trunc((jpeg.height() - side) * top),
                  std::trunc(side), std::trunc(side), bool(mirrored)};
    return filled(jpeg, factor, box, given.squares, true);
}

PyMethodDef methods[] = {
    {"size", size_of, METH_VARARGS,
     "size(blob) -> (width, height)\n\nOf a JPEG that is grey or YCbCr; None of anything else."},
    {"part", part_of, METH_VARARGS,
     "part(blob, out, factor, (left, top, side), mirrored, vectors=True) -> bool\n\n"
     "Decode a JPEG at 1/factor of its size and fill each uint8 [size, size, 3] of out with a square of it, in pixels\n"
     "of the picture as it is stored. False, and out may hold anything, when it is nothing for this decoder or damaged."},
    {"view", view_of, METH_VARARGS,
     "view(blob, out, target, max_pixels, (side, left, top), mirrored) -> bool | None\n\n"
     "The same by the rule of decode.py: what a View of those shares takes, of a picture reduced for squares of target\n"
     "pixels. False also when it has more than max_pixels; None when it has EXIF data, which may ask for turns."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg", "JPEGs to squares of pixels; see jpeg.cpp.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__jpeg() {
    PyObject* made = PyModule_Create(&module);
    if (made == nullptr) return nullptr;
    if (PyModule_AddStringConstant(made, "version", TEXT(LIBJPEG_TURBO_VERSION)) ||
        PyModule_AddIntConstant(made, "has_vectors", resample::has_vectors())) {
        Py_DECREF(made);
        return nullptr;
    }
    return made;
}
