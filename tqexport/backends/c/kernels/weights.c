/* The product of a window with the int8 weights of one output channel. */
static int32_t times_weights(const int16_t *window, const int8_t *weights, int32_t size)
{
    int32_t i, sum = 0;
    for (i = 0; i < size; i++) {
        sum += (int32_t)window[i] * (int16_t)weights[i];
    }
    return sum;
}
