/* The same levels in another shape, where PyTorch counts them channels first and these values are channels last. */
static void reshape(const int8_t *input, int8_t *output, int32_t count, int32_t places, int32_t new_places)
{
    const int32_t channels = count / places, new_channels = count / new_places;
    int32_t i;
    for (i = 0; i < count; i++) { /* the i-th level, channels first */
        output[i % new_places * new_channels + i / new_places] = input[i % places * channels + i / places];
    }
}
