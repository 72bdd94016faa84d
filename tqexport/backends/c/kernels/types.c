/* The grid of a value: value = scale * (q - zero), q from low to high. The scale is in the header only: nothing here
 * computes in floating point. */
typedef struct {
    int8_t zero, low, high;
} grid;

/* What depends on the width alone. */
typedef struct {
    uint8_t bits;
    uint8_t row;     /* in tables that have a row for each width */
    uint8_t shift;   /* to the right, of each code as it is read */
    uint8_t highest; /* the highest code, 2^bits - 1 */
    uint8_t step;    /* weights are step * (2 * code - highest) */
} width;
