/* multiplier * 2^(exponent - 31), at one width. */
typedef struct {
    int32_t multiplier;
    int8_t exponent;
} factor;
