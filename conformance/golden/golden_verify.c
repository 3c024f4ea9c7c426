/*
 * The verdict on outputs for golden vectors, as `polyfuse golden verify` gives it, in C99 without dependencies.
 *
 *     cc -std=c99 -O2 -o golden_verify golden_verify.c
 *     ./golden_verify DIR OUTPUTS
 *
 * DIR is what `polyfuse golden export` wrote, OUTPUTS a folder with one .npy file for each result, under the name that
 * the manifest gives it. Exit status: 0 all results are there and right, 1 some are not, 2 DIR cannot be used.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCHEMA = 2, LINE = 8192, MOST_DIMS = 32, LONGEST_HEADER = 10000, ANY = 1, SIGN = 2 };

/* How the bits of a dtype are read. A .npy file says `stored` of it; its order of bytes is little-endian. */
enum kind { IEEE, FINITE_NAN, UNSIGNED_ZERO, FINITE, SIGNED, UNSIGNED };
struct format {
    const char *name, *stored;
    int size, exponent, mantissa, bias;
    enum kind kind;
};
static const struct format FORMATS[] = {
    {"float64", "<f8", 8, 11, 52, 1023, IEEE},
    {"float32", "<f4", 4, 8, 23, 127, IEEE},
    {"float16", "<f2", 2, 5, 10, 15, IEEE},
    {"bfloat16", "<u2", 2, 8, 7, 127, IEEE},
    {"float8_e5m2", "|u1", 1, 5, 2, 15, IEEE},
    {"float8_e4m3fn", "|u1", 1, 4, 3, 7, FINITE_NAN},
    {"float8_e4m3fnuz", "|u1", 1, 4, 3, 8, UNSIGNED_ZERO},
    {"float8_e5m2fnuz", "|u1", 1, 5, 2, 16, UNSIGNED_ZERO},
    {"float4_e2m1fn", "|u1", 1, 2, 1, 1, FINITE},
    {"int8", "|i1", 1, 0, 0, 0, SIGNED},
    {"int16", "<i2", 2, 0, 0, 0, SIGNED},
    {"int32", "<i4", 4, 0, 0, 0, SIGNED},
    {"int64", "<i8", 8, 0, 0, 0, SIGNED},
    {"uint8", "|u1", 1, 0, 0, 0, UNSIGNED},
    {"uint16", "<u2", 2, 0, 0, 0, UNSIGNED},
    {"uint32", "<u4", 4, 0, 0, 0, UNSIGNED},
    {"uint64", "<u8", 8, 0, 0, 0, UNSIGNED},
    {"bool", "|b1", 1, 0, 0, 0, UNSIGNED},
};

struct array {
    const struct format *format;
    int dims;
    size_t shape[MOST_DIMS], count;
    unsigned char *bytes; /* the elements in C order */
};

/* The files of one result, and what the index says of it. */
enum part { LOW, HIGH, EXACT, FLAGS, PARTS };
static const char *const PART_NAMES[PARTS] = {"low", "high", "exact", "flags"};
struct result {
    int open, damaged;
    char dtype[64], compared[64], file[LINE];
    struct array parts[PARTS];
};

static const char *folder, *outputs;
static char case_name[LINE], array_name[LINE]; /* what is being looked at, or empty */
static int problems, cases, right_cases;

static int unusable(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("Error: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

/* Say what is wrong with an array of the case. Returns 0, as a function does that found something wrong. */
static int wrong(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("WRONG  %s: %s: ", case_name, array_name);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
    problems++;
    return 0;
}

static void *allocated(size_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory) unusable("out of memory");
    return memory;
}

/* SHA-256 as FIPS 180-4 defines it. */

static const uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t turned(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static void hash_block(uint32_t state[8], const unsigned char *block) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
               block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ (a >> 3)) + w[i - 7] +
               (turned(b, 17) ^ turned(b, 19) ^ (b >> 10));
    }
    memcpy(v, state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[0], e = v[4];
        uint32_t one = v[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + ROUNDS[i] +
                       w[i];
        uint32_t two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int i = 0; i < 8; i++) state[i] += v[i];
}

static void sha256(const unsigned char *data, size_t size, char hex[65]) {
    uint32_t state[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    unsigned char tail[128] = {0};
    size_t whole = size / 64 * 64, rest = size - whole, padded = rest < 56 ? 64 : 128;
    for (size_t at = 0; at < whole; at += 64) hash_block(state, data + at);
    if (rest) memcpy(tail, data + whole, rest);
    tail[rest] = 0x80;
    for (int i = 0; i < 8; i++) tail[padded - 1 - (size_t)i] = (unsigned char)(((uint64_t)size * 8) >> (8 * i));
    for (size_t at = 0; at < padded; at += 64) hash_block(state, tail + at);
    for (int i = 0; i < 8; i++) sprintf(hex + 8 * i, "%08lx", (unsigned long)state[i]);
}

/* Files. Each function says what is wrong and returns 0, or nothing and 1. */

static int read_file(const char *path, unsigned char **data, size_t *size) {
    FILE *file = fopen(path, "rb");
    size_t room = 1 << 16;
    if (!file) return wrong("%s: missing", path);
    *data = allocated(room);
    *size = 0;
    for (;;) {
        size_t got = fread(*data + *size, 1, room - *size, file);
        *size += got;
        if (*size < room) break;
        unsigned char *larger = room > SIZE_MAX / 2 ? NULL : realloc(*data, room *= 2);
        if (!larger) unusable("%s: out of memory", path);
        *data = larger;
    }
    int failed = ferror(file);
    fclose(file);
    if (!failed) return 1;
    free(*data);
    return wrong("%s: cannot be read", path);
}

static const struct format *format_of(const char *dtype) {
    for (size_t i = 0; i < sizeof FORMATS / sizeof *FORMATS; i++)
        if (!strcmp(FORMATS[i].name, dtype)) return &FORMATS[i];
    unusable("index.txt: expected a dtype that this program knows, got %s", dtype);
    return NULL;
}

/* What stands behind 'key': in the header of a .npy file, or NULL. */
static const char *header_value(const char *header, const char *key) {
    for (const char *at = header; (at = strstr(at, key)) != NULL; at++) {
        const char *end = at + strlen(key);
        if (at == header || (at[-1] != '\'' && at[-1] != '"') || *end != at[-1]) continue;
        for (end++; *end == ' '; end++) {
        }
        if (*end != ':') continue;
        for (end++; *end == ' '; end++) {
        }
        return end;
    }
    return NULL;
}

/* The shape (3, 4), as numbers; 0 if it is none or has more dimensions than an array can have. */
static int parse_shape(const char *text, struct array *array) {
    array->dims = 0;
    if (*text++ != '(') return 0;
    for (;;) {
        size_t size = 0;
        while (*text == ' ') text++;
        if (*text == ')') return 1;
        if (*text < '0' || *text > '9' || array->dims == MOST_DIMS) return 0;
        for (; *text >= '0' && *text <= '9'; text++) {
            size_t digit = (size_t)(*text - '0');
            if (size > (SIZE_MAX - digit) / 10) return 0;
            size = 10 * size + digit;
        }
        array->shape[array->dims++] = size;
        while (*text == ' ') text++;
        if (*text == ',') text++;
        else if (*text != ')') return 0;
    }
}

/* Number of elements of a shape whose bytes are `bytes` in all, or 0 elements; 0 if they are not. */
static int count_elements(struct array *array, size_t bytes) {
    size_t most = bytes / (size_t)array->format->size;
    array->count = 1;
    for (int i = 0; i < array->dims; i++)
        if (!array->shape[i]) array->count = 0;
    for (int i = 0; i < array->dims && array->count; i++) {
        if (array->shape[i] > most / array->count) return 0;
        array->count *= array->shape[i];
    }
    return array->count * (size_t)array->format->size == bytes;
}

/* Copy elements that lie with the first dimension fastest into C order. */
static void copy_reordered(struct array *array, const unsigned char *data) {
    size_t at[MOST_DIMS] = {0}, size = (size_t)array->format->size;
    for (size_t i = 0; i < array->count; i++) {
        size_t from = 0;
        for (int d = array->dims; d-- > 0;) from = from * array->shape[d] + at[d];
        memcpy(array->bytes + i * size, data + from * size, size);
        for (int d = array->dims; d-- > 0 && ++at[d] == array->shape[d];) at[d] = 0;
    }
}

/* Read the array in the bytes of a .npy file, whose dtype must be what stands for `dtype`. */
static int parse_npy(const char *path, const unsigned char *data, size_t size, const char *dtype, struct array *array) {
    static char header[LONGEST_HEADER + 1];
    size_t start = 10, length;
    if (size < 10 || memcmp(data, "\x93NUMPY", 6)) return wrong("%s: not a .npy file", path);
    length = data[8] | (size_t)data[9] << 8;
    if ((data[6] != 1 && data[6] != 2) || data[7])
        return wrong("%s: expected version 1.0 or 2.0 of the .npy format, got another", path);
    if (data[6] == 2) {
        if (size < 12) return wrong("%s: not a .npy file", path);
        length |= (size_t)data[10] << 16 | (size_t)data[11] << 24;
        start = 12;
    }
    if (length > size - start || length > LONGEST_HEADER) return wrong("%s: not a .npy file", path);
    memcpy(header, data + start, length);
    header[length] = 0;
    const char *descr = header_value(header, "descr"), *order = header_value(header, "fortran_order");
    const char *shape = header_value(header, "shape");
    int fortran = order && !strncmp(order, "True", 4);
    if (strlen(header) != length || !descr || !shape || !order || (!fortran && strncmp(order, "False", 5)))
        return wrong("%s: not a .npy file", path);
    const char *closed = *descr == '\'' || *descr == '"' ? strpbrk(descr + 1, "'\"") : NULL;
    if (!closed || *closed != *descr || !parse_shape(shape, array)) return wrong("%s: not a .npy file", path);
    array->format = format_of(dtype);
    size_t stored = strlen(array->format->stored), left = size - start - length;
    if (strncmp(descr + 1, array->format->stored, stored) || descr[1 + stored] != *descr)
        return wrong("%s: expected dtype '%s' (the bits of %s), got '%.*s'", path, array->format->stored, dtype,
                     (int)strcspn(descr + 1, "'\""), descr + 1);
    if (!count_elements(array, left))
        return wrong("%s: %lu bytes of data are not those of its shape", path, (unsigned long)left);
    array->bytes = allocated(left);
    if (fortran) copy_reordered(array, data + start + length);
    else if (left) memcpy(array->bytes, data + start + length, left);
    return 1;
}

static void join(char *path, size_t room, const char *base, const char *name) {
    if (*name == '/' || !strncmp(name, "../", 3) || strstr(name, "/../") || strchr(name, '\\'))
        unusable("index.txt: %s leads out of its folder", name);
    if (snprintf(path, room, "%s/%s", base, name) >= (int)room) unusable("%s/%s: too long a name", base, name);
}

/* Read a file of the golden vectors, which must be what was exported, as an array unless that is NULL. */
static int read_exported(const char *name, const char *hash, const char *dtype, struct array *array) {
    char path[2 * LINE], found[65];
    unsigned char *data;
    size_t size;
    join(path, sizeof path, folder, name);
    if (!read_file(path, &data, &size)) return 0;
    sha256(data, size, found);
    int right = strcmp(found, hash) ? wrong("%s: changed since it was exported: its SHA-256 is not the index's", path)
                                    : !array || parse_npy(path, data, size, dtype, array);
    free(data);
    return right;
}

/* Numbers. Every value of every format is a double, but for integers past 2^53, which round to one. */

static double from_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int is_nan(double x) { return x != x; }
static int is_finite(double x) { return x - x == 0; }

static int sign_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (int)(bits >> 63);
}

static double element(const struct array *array, size_t index) {
    const struct format *f = array->format;
    const unsigned char *bytes = array->bytes + index * (size_t)f->size;
    uint64_t bits = 0;
    for (int i = f->size; i-- > 0;) bits = bits << 8 | bytes[i];
    if (f->kind == UNSIGNED) return (double)bits;
    uint64_t negative = bits >> (f->kind == SIGNED ? 8 * f->size - 1 : f->exponent + f->mantissa) & 1;
    if (f->kind == SIGNED) {
        uint64_t all = f->size == 8 ? UINT64_MAX : ((uint64_t)1 << (8 * f->size)) - 1;
        return negative ? -(double)((~bits & all) + 1) : (double)bits;
    }
    if (f->size == 8) return from_bits(bits);
    uint64_t top = ((uint64_t)1 << f->exponent) - 1, fraction = bits & (((uint64_t)1 << f->mantissa) - 1);
    uint64_t exponent = bits >> f->mantissa & top, sign = negative << 63, infinite = (uint64_t)0x7ff << 52;
    uint64_t not_a_number = (uint64_t)0x7ff8 << 48;
    if (f->kind == IEEE && exponent == top) return from_bits(sign | (fraction ? not_a_number : infinite));
    if (f->kind == FINITE_NAN && exponent == top && fraction + 1 == (uint64_t)1 << f->mantissa)
        return from_bits(sign | not_a_number);
    if (f->kind == UNSIGNED_ZERO && negative && !exponent && !fraction) return from_bits(sign | not_a_number);
    uint64_t whole = exponent ? fraction | (uint64_t)1 << f->mantissa : fraction;
    int power = (int)(exponent ? exponent : 1) - f->bias - f->mantissa;
    double size = (double)whole * from_bits((uint64_t)(1023 + power) << 52);
    return negative ? -size : size;
}

/* The verdict. */

static int is_right(double got, double low, double high, double exact, int flags) {
    if (flags & ANY) return 1;
    int right = (is_nan(exact) && is_nan(got)) || (got >= low && got <= high);
    return right && (!(flags & SIGN) || sign_of(got) == sign_of(exact));
}

/* A number as text, without the sign of a NaN, which C libraries print differently. */
static const char *shown(double x, char text[32]) {
    if (is_nan(x)) strcpy(text, "nan");
    else sprintf(text, "%.9g", x);
    return text;
}

static void show_shape(const struct array *array) {
    for (int d = 0; d < array->dims; d++) printf("%s%lu", d ? ", " : "", (unsigned long)array->shape[d]);
}

static int same_shape(const struct array *one, const struct array *other) {
    return one->dims == other->dims && !memcmp(one->shape, other->shape, (size_t)one->dims * sizeof *one->shape);
}

static void compare(const struct result *result, const struct array *got) {
    const struct array *parts = result->parts, *exact = &parts[EXACT];
    size_t count = 0, worst = 0;
    double farthest = -1;
    if (!same_shape(got, exact)) {
        printf("WRONG  %s: %s: expected shape [", case_name, array_name);
        show_shape(exact);
        printf("], got [");
        show_shape(got);
        puts("]");
        problems++;
        return;
    }
    for (size_t i = 0; i < got->count; i++) {
        double value = element(got, i), right = element(exact, i);
        int flags = parts[FLAGS].bytes ? parts[FLAGS].bytes[i] : 0;
        if (is_right(value, element(&parts[LOW], i), element(&parts[HIGH], i), right, flags)) continue;
        double distance = value > right ? value - right : right - value;
        if (!is_finite(distance)) distance = from_bits((uint64_t)0x7ff << 52);
        count++;
        if (distance > farthest) farthest = distance, worst = i;
    }
    if (!count) return;
    size_t at[MOST_DIMS], rest = worst;
    for (int d = got->dims; d-- > 0; rest /= got->shape[d]) at[d] = rest % got->shape[d];
    char low[32], high[32], middle[32], value[32];
    printf("WRONG  %s: %s: %lu of %lu elements wrong; at [", case_name, array_name, (unsigned long)count,
           (unsigned long)got->count);
    for (int d = 0; d < got->dims; d++) printf("%s%lu", d ? ", " : "", (unsigned long)at[d]);
    printf("] expected %s to %s (exact %s), got %s\n", shown(element(&parts[LOW], worst), low),
           shown(element(&parts[HIGH], worst), high), shown(element(exact, worst), middle),
           shown(element(got, worst), value));
    problems++;
}

/* Take what an array's bytes hold as elements of their own, along the last dimension: of numbers of four bits two, the
 * first in the low half, else one. */
static void as_parts(struct array *array, const char *dtype) {
    size_t bytes = array->count * (size_t)array->format->size, parts = (size_t)array->format->size;
    array->format = format_of(dtype);
    if (array->format->kind == FINITE) {
        unsigned char *halves = allocated(2 * bytes);
        for (size_t i = 0; i < 2 * bytes; i++) halves[i] = array->bytes[i / 2] >> (i % 2 * 4) & 15;
        free(array->bytes);
        array->bytes = halves;
        parts *= 2;
    }
    if (array->dims) array->shape[array->dims - 1] *= parts;
    array->count *= parts;
}

/* Judge the output of the result whose lines have all been read. */
static void finish_result(struct result *result) {
    struct array got = {0}, *exact = &result->parts[EXACT];
    unsigned char *data;
    size_t size;
    char path[2 * LINE];
    for (int part = 0; part < PARTS && result->open && !result->damaged; part++) {
        if (!result->parts[part].bytes && part != FLAGS)
            unusable("index.txt: %s has no %s", array_name, PART_NAMES[part]);
        if (result->parts[part].bytes && !same_shape(&result->parts[part], exact))
            unusable("index.txt: %s: the shapes of its files differ", array_name);
    }
    if (result->open && !result->damaged) {
        join(path, sizeof path, outputs, result->file);
        if (read_file(path, &data, &size)) {
            if (parse_npy(path, data, size, result->dtype, &got)) {
                if (strcmp(result->dtype, result->compared)) as_parts(&got, result->compared);
                compare(result, &got);
                free(got.bytes);
            }
            free(data);
        }
    }
    for (int part = 0; part < PARTS; part++) free(result->parts[part].bytes);
    memset(result, 0, sizeof *result);
}

static void finish_case(struct result *result) {
    finish_result(result);
    if (!*case_name) return;
    if (!problems) printf("right  %s\n", case_name);
    right_cases += !problems;
    cases++;
    problems = 0;
    *case_name = 0;
}

/* Look at what one line of the index says, in its words. Returns whether it is a line of an index. */
static int follow(const char *line, struct result *result) {
    char key[16], one[LINE], two[LINE], three[LINE], four[LINE];
    int words = sscanf(line, "%15s %s %s %s %s", key, one, two, three, four);
    if (words == 2 && !strcmp(key, "case")) {
        finish_case(result);
        strcpy(case_name, one);
        return 1;
    }
    if (!*case_name) return 0;
    if (words == 4 && !strcmp(key, "input")) {
        finish_result(result);
        strcpy(array_name, one);
        read_exported(two, three, NULL, NULL);
        return 1;
    }
    if (words == 5 && !strcmp(key, "result")) {
        finish_result(result);
        if (strlen(two) >= sizeof result->dtype || strlen(three) >= sizeof result->compared) return 0;
        strcpy(array_name, one);
        strcpy(result->dtype, two);
        strcpy(result->compared, three);
        strcpy(result->file, four);
        return result->open = 1;
    }
    for (int part = 0; part < PARTS; part++) {
        const char *dtypes[PARTS] = {result->compared, result->compared, "float64", "uint8"};
        if (words != 3 || strcmp(key, PART_NAMES[part]) || !result->open || result->parts[part].bytes) continue;
        if (!read_exported(one, two, dtypes[part], &result->parts[part])) result->damaged = 1;
        return 1;
    }
    return 0;
}

int main(int count, char **words) {
    static char path[2 * LINE], line[LINE], rest[2];
    static struct result result;
    int version = 0, number = 1, stated = -1;
    if (count != 3) unusable("usage: golden_verify DIR OUTPUTS");
    folder = words[1];
    outputs = words[2];
    if (sizeof(double) != 8) unusable("this machine's double is not of 64 bits");
    join(path, sizeof path, folder, "index.txt");
    FILE *file = fopen(path, "r");
    if (!file) unusable("%s: missing", path);
    if (!fgets(line, LINE, file) || sscanf(line, "polyfuse-golden %d %1s", &version, rest) != 1 || version != SCHEMA)
        unusable("%s: expected the index of golden vectors of schema %d; export them again", path, SCHEMA);
    while (stated < 0 && fgets(line, LINE, file)) {
        number++;
        if (!strchr(line, '\n')) unusable("%s: line %d is cut off", path, number);
        if (sscanf(line, "end %d %1s", &stated, rest) == 1) finish_case(&result);
        else if (!follow(line, &result)) unusable("%s: line %d is none of an index", path, number);
    }
    fclose(file);
    if (stated != cases) unusable("%s: cut off", path);
    printf("%d of %d cases right\n", right_cases, cases);
    return right_cases == cases && cases ? 0 : 1;
}
