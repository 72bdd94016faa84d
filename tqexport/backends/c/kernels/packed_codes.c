/* The product of a window with the codes of one output channel, CODES_PER_BYTE in a byte, the first one lowest. Each
 * channel begins with a byte of its own. */
static int32_t times_codes(const int16_t *window, const uint8_t *codes, int32_t channel, int32_t size, int32_t shift)
{
    const int32_t whole = size / CODES_PER_BYTE;
    int32_t i, k, sum = 0;
    codes += channel * ((size + CODES_PER_BYTE - 1) / CODES_PER_BYTE);
    for (i = 0; i < whole; i++) {
        for (k = 0; k < CODES_PER_BYTE; k++) {
            sum += (int32_t)window[k] * (int16_t)(codes[i] >> (k * BITS) & ((1 << BITS) - 1));
        }
        window += CODES_PER_BYTE;
    }
    for (k = 0; k < size % CODES_PER_BYTE; k++) {
        sum += (int32_t)window[k] * (int16_t)(codes[whole] >> (k * BITS) & ((1 << BITS) - 1));
    }
    (void)shift; /* these codes have their width already */
    return sum;
}
