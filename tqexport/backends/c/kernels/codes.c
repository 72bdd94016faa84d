/* The product of a window with the codes of one output channel, a byte each, which are shifted as they are read. */
static int32_t times_codes(const int16_t *window, const uint8_t *codes, int32_t channel, int32_t size, int32_t shift)
{
    int32_t i, sum = 0;
    codes += channel * size;
    for (i = 0; i < size; i++) {
        sum += (int32_t)window[i] * (int16_t)(codes[i] >> shift);
    }
    return sum;
}
