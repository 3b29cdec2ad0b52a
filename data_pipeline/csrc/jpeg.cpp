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
#include <stdexcept>
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
        : across(box.left, box.width, size, plane.width, kind(box.width, size, coarse[0])),
          down(box.top, box.height, size, plane.height, kind(box.height, size, coarse[1])),
          along((box.mirrored ? across.mirror() : void(), across), vectors) {}

    Filters(const Filters&) = delete;

    // What is coarse lies on lines from pixel to pixel, as in libjpeg's own interpolation.
    static Kind kind(double side, int size, bool coarse) {
        if (coarse) return Kind::linear;
        return side >= size ? Kind::area : Kind::cubic;
    }
};

// A plane's way to a square, and the rows of it that are ready.
struct Way {
    std::shared_ptr<const Filters> filters;
    int width;
    std::unique_ptr<int16_t[]> values;  // [down.end - down.begin][width]

    explicit Way(std::shared_ptr<const Filters> own)
        : filters(std::move(own)),
          width(resample::padded(filters->down.size)),
          values(new int16_t[size_t(filters->down.end - filters->down.begin) * width]) {}

    void take(const uint8_t* pixels, int row) {
        const Filter& down = filters->down;
        if (row >= down.begin && row < down.end) filters->along(pixels, &values[size_t(row - down.begin) * width]);
    }

    void give(int i, int16_t* out, bool vectors) const {
        const Filter& down = filters->down;
        resample::column(&values[size_t(down.first[i] - down.begin) * width], &down.weights[size_t(i) * down.taps],
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
        jpeg_read_header(&jpeg_, TRUE);
        const bool grey = jpeg_.jpeg_color_space == JCS_GRAYSCALE && jpeg_.num_components == 1;
        return grey || (jpeg_.jpeg_color_space == JCS_YCbCr && jpeg_.num_components == 3);
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

void draw(const std::vector<Way>& ways, const Square& square, bool vectors) {
    const int width = resample::padded(square.size);
    std::vector<int16_t> rows[3];
    for (auto& row : rows) row.assign(width, resample::MIDDLE);
    for (int i = 0; i < square.size; i++) {
        for (size_t plane = 0; plane < ways.size(); plane++) ways[plane].give(i, rows[plane].data(), vectors);
        resample::colours(rows[0].data(), rows[1].data(), rows[2].data(), square.size,
                          square.pixels + size_t(3) * square.size * i, vectors);
    }
}

bool decode(const uint8_t* data, size_t size, int factor, const Box& box, const std::vector<Square>& squares,
            bool vectors) {
    Jpeg jpeg(data, size);
    if (!jpeg.open()) return false;
    const double right = box.left + box.width, bottom = box.top + box.height;
    if (!(box.left >= 0 && box.top >= 0 && box.width > 0 && right <= jpeg.width() && bottom <= jpeg.height()))
        throw std::invalid_argument("the square must lie within the picture");
    if (!jpeg.start(factor)) return false;
    std::vector<Plane> planes = jpeg.planes();
    std::vector<JSAMPARRAY> bands;
    for (auto& plane : planes) bands.push_back(plane.pointers.data());
    std::vector<std::vector<Way>> ways(squares.size());
    for (size_t s = 0; s < squares.size(); s++)
        for (int p = 0; p < int(planes.size()); p++) {
            const double x = jpeg.across(p), y = jpeg.down(p);
            const Box own{box.left * x, box.top * y, box.width * x, box.height * y, box.mirrored};
            const bool coarse[2] = {x < jpeg.across(0), y < jpeg.down(0)};
            const bool alike = p == 2 && jpeg.across(1) == x && jpeg.down(1) == y;
            ways[s].emplace_back(alike ? ways[s][1].filters
                                       : std::make_shared<const Filters>(planes[p], own, squares[s].size, coarse, vectors));
        }
    for (int number = 0; jpeg.more(); number++) {
        if (!jpeg.band(bands.data())) return false;
        for (size_t p = 0; p < planes.size(); p++)
            for (int row = 0; row < planes[p].rows; row++)
                for (auto& own : ways) own[p].take(planes[p].pointers[row], number * planes[p].rows + row);
    }
    if (!jpeg.finish()) return false;
    for (size_t s = 0; s < squares.size(); s++) draw(ways[s], squares[s], vectors);
    return true;
}

struct Buffer {
    Py_buffer view{};
    ~Buffer() { PyBuffer_Release(&view); }
};

PyObject* size_of(PyObject*, PyObject* arguments) {
    Buffer blob;
    if (!PyArg_ParseTuple(arguments, "y*", &blob.view)) return nullptr;
    Jpeg jpeg(static_cast<const uint8_t*>(blob.view.buf), size_t(blob.view.len));
    if (!jpeg.open()) Py_RETURN_NONE;
    return Py_BuildValue("ii", jpeg.width(), jpeg.height());
}

PyObject* squares_of(PyObject*, PyObject* arguments) {
    Buffer blob;
    PyObject* out;
    int factor, mirrored, vectors = 1;
    Box box;
    if (!PyArg_ParseTuple(arguments, "y*Oi(ddd)p|p", &blob.view, &out, &factor, &box.left, &box.top, &box.width,
                          &mirrored, &vectors))
        return nullptr;
    box.height = box.width;
    box.mirrored = mirrored;
    std::vector<Buffer> buffers(size_t(std::max<Py_ssize_t>(0, PySequence_Size(out))));
    if (PyErr_Occurred()) return nullptr;
    std::vector<Square> squares;
    for (size_t i = 0; i < buffers.size(); i++) {
        PyObject* one = PySequence_GetItem(out, Py_ssize_t(i));
        if (one == nullptr) return nullptr;
        const int failed = PyObject_GetBuffer(one, &buffers[i].view, PyBUF_WRITABLE | PyBUF_ND);
        Py_DECREF(one);
        if (failed) return nullptr;
        const Py_buffer& view = buffers[i].view;
        if (view.ndim != 3 || view.itemsize != 1 || view.shape[0] < 1 || view.shape[0] > 1 << 16 ||
            view.shape[1] != view.shape[0] || view.shape[2] != 3) {
            PyErr_SetString(PyExc_ValueError, "each square must be uint8 [size, size, 3]");
            return nullptr;
        }
        squares.push_back({static_cast<uint8_t*>(view.buf), int(view.shape[0])});
    }
    if (factor != 1 && factor != 2 && factor != 4 && factor != 8) {
        PyErr_SetString(PyExc_ValueError, "factor must be 1, 2, 4 or 8");
        return nullptr;
    }
    bool done = false, room = true;
    std::string wrong;
    Py_BEGIN_ALLOW_THREADS;
    try {
        done = decode(static_cast<const uint8_t*>(blob.view.buf), size_t(blob.view.len), factor, box, squares,
                      vectors && resample::has_vectors());
    } catch (const std::bad_alloc&) {
        room = false;
    } catch (const std::invalid_argument& error) {
        wrong = error.what();
    }
    Py_END_ALLOW_THREADS;
    if (!room) return PyErr_NoMemory();
    if (!wrong.empty()) {
        PyErr_SetString(PyExc_ValueError, wrong.c_str());
        return nullptr;
    }
    return PyBool_FromLong(done);
}

PyMethodDef methods[] = {
    {"size", size_of, METH_VARARGS,
     "size(blob) -> (width, height)\n\nOf a JPEG that is grey or YCbCr; None of anything else."},
    {"squares", squares_of, METH_VARARGS,
     "squares(blob, out, factor, (left, top, side), mirrored, vectors=True) -> bool\n\n"
     "Decode a JPEG at 1/factor of its size and fill each uint8 [size, size, 3] of out with a square of it, in pixels\n"
     "of the picture as it is stored. False, and out may hold anything, when it is nothing for this decoder or damaged."},
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
